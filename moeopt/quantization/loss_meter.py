"""A rewritten model run with the codes of some of its experts and the floats of others, beside the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.ops.override import override_experts_impl
from moeopt.quantization.quantized_products import QuantizedProducts
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.live_bank import live_bank
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.value_types import PyObject
from moeopt.verification.loss import LossFigures
from moeopt.verification.model import run_plain

ALL = "all of them"
"""The variant whose choices of experts are compared with those of the floats; no module path has spaces."""
Bank = tuple[Any, Any]
_NONE: Mapping[str, Collection[str]] = MappingProxyType({})
_OWN: Mapping[str, str] = MappingProxyType({})
Ids = dict[tuple[str, int], list[Tensor]]
"""By block and bank, the experts that each call chose, (T, K)."""


def float_banks(forward: RewrittenForward) -> list[Bank]:
    """The banks of a block as its floats."""
    module = forward.module
    return [
        (live_bank(module, bank.experts, spec), spec) if isinstance(bank, LiveCodes) else (bank, spec)
        for bank, spec in forward.banks
    ]


class LossMeter:
    """Runs the twin with some of its banks and products in codes and compares with the original.

    Args:
        variants: by name, the banks that are codes in it, by block; all other banks are floats.
        products: those of the twin outside of its blocks; ``groups`` has, by a variant's name, the groups of them that
            are codes in it, and ``schemes`` those in which the codes are other than the plan's.
    """

    def __init__(
        self, source: nn.Module, twin: nn.Module, blocks: dict[str, RewrittenForward],
        routed: Mapping[str, Sequence[bool]], variants: Mapping[str, Mapping[str, list[Bank]]], language: bool,
        products: QuantizedProducts | None = None, groups: Mapping[str, Collection[str]] = _NONE,
        schemes: Mapping[str, str] = _OWN,
    ) -> None:  # fmt: skip
        self.products = QuantizedProducts() if products is None else products
        self.groups, self.schemes = groups, schemes
        self.source, self.twin, self.blocks, self.routed, self.variants = source, twin, blocks, routed, variants
        self.floats = {path: float_banks(forward) for path, forward in blocks.items()}
        self.figures = {name: LossFigures(language) for name in variants}
        self.base_ids: Ids = {}
        self.ids: Ids = {}

    def run(self, call: ArgsKwargs, engine: Callable[..., Any] | None = None) -> None:
        """Add one call to the figures of each variant, and to the experts chosen with no codes and with all.

        ``engine``: gives the outputs of the variant ``ALL`` in the twin's place.
        """
        want = run_plain(self.source, *call)
        with self._banks({}), self.products.only(self.twin, ()), self._noted(self.base_ids):
            run_plain(self.twin, *call)
        for name, quantized in self.variants.items():
            chosen = self.products.only(self.twin, self.groups.get(name, ()), self.schemes.get(name, ""))
            noted = self._noted(self.ids) if name == ALL else contextlib.nullcontext()
            with self._banks(quantized), chosen, noted:
                got = run_plain(self.twin, *call)
            if engine is not None and name == ALL:
                got = run_plain(engine, *call)
            self.figures[name].add(want, got, call)

    @contextlib.contextmanager
    def _banks(self, quantized: Mapping[str, list[Bank]]) -> Iterator[None]:
        before = {path: forward.banks for path, forward in self.blocks.items()}
        for path, forward in self.blocks.items():
            forward.banks = quantized.get(path, self.floats[path])
        try:
            yield
        finally:
            for path, forward in self.blocks.items():
                forward.banks = before[path]

    @contextlib.contextmanager
    def _noted(self, into: Ids) -> Iterator[None]:
        """While open, the ids that reach each bank of a quantised block are written down."""
        places = {}
        for path, forward in self.blocks.items():
            for number, (bank, _) in enumerate(forward.banks):
                if self.routed[path][number]:
                    places[id(bank)] = path, number

        def note(x: Tensor, ids: Tensor, weights: Tensor, bank: PyObject, spec: PyObject) -> None:
            if id(bank) in places:
                into.setdefault(places[id(bank)], []).append(ids.detach().to(torch.int64).cpu())

        with override_experts_impl(note):
            yield

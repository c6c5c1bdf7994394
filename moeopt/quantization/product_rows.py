"""What reaches products outside of experts on calibration data: the rows that a plan's method weighs by.

As with experts, these are the rows of the original model, so no product depends on how another was rounded. Rows are
held for as many products at a time as fit into ``LARGEST`` bytes; for the others the calls run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.rewrite.expert_rows import OneExpertsRows
from moeopt.value_types import PyObject
from moeopt.verification.model import run_plain

LARGEST = 1 << 30
"""Bytes of rows that are held at once."""


def rows_of_products(
    source: nn.Module, paths: Sequence[str], calls: Sequence[ArgsKwargs]
) -> Iterator[tuple[str, OneExpertsRows | None]]:
    """Each path and what the module there is called with; None where nothing reaches it, or there are no calls.

    Raises:
        UsageError: a call sends NaN or infinity to one.
    """
    left = list(paths)
    model = shared_copy(source) if calls and left else source
    while left:
        held = _Held(left)
        for number, call in enumerate(calls):
            held.watch(model, number, call)
        yield from ((path, held.rows(path)) for path in left if path not in held.later)
        left = [path for path in left if path in held.later]


class _Held:
    """The rows of the first products of a list, as many as there is room for; the others are for ``later``."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._order, self.later = list(paths), set[str]()
        self._kept: dict[str, list[Tensor]] = {}

    def watch(self, model: nn.Module, number: int, call: ArgsKwargs) -> None:
        handles = [
            model.get_submodule(path).register_forward_pre_hook(self._hook(path, number), with_kwargs=True)
            for path in self._order
            if path not in self.later
        ]
        try:
            run_plain(model, *call)
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, path: str) -> OneExpertsRows | None:
        rows = self._kept.pop(path, [])
        if not rows:
            return None
        together = torch.cat(rows)
        return OneExpertsRows(together, torch.ones(len(together), 1, device=together.device))

    def _hook(self, path: str, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: PyObject, kwargs: PyObject) -> None:
            x = next((leaf.detach() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if x is None or path in self.later:
                return
            if not bool(torch.isfinite(x).all()):
                raise UsageError(
                    f"call {number} of calibration= sends NaN or infinity to {path}: leave it out, or give "
                    "method='search' without calibration="
                )
            self._kept.setdefault(path, []).append(x.reshape(-1, x.shape[-1]).clone())
            self._make_room()

        return hook

    def _make_room(self) -> None:
        size = {path: sum(t.nbytes for t in rows) for path, rows in self._kept.items()}
        for path in reversed(self._order[1:]):
            if sum(size.values()) <= LARGEST:
                return
            if path in size:
                del size[path], self._kept[path]
                self.later.add(path)

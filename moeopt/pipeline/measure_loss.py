"""What quantising lost on a user's data: the original beside its twin with each block, and with all blocks, in codes.

    base        the original's own code                          the outputs that all others are compared with
    float       the rewritten twin on its floats                 the choices of experts that others are compared with
    block b     the twin with the codes of block b alone         what that block costs
    all         the twin with all codes                          ``certificate.loss``
    reference   the twin with all of these blocks in int8 per channel, a scheme that everybody knows

One call of the data at a time: the outputs of one call are all that is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.find.batches import batches
from moeopt.find.example_inputs import in_order, without_cache
from moeopt.ir.weight_format import INT8_CHANNEL
from moeopt.ops.override import override_experts_impl
from moeopt.options import Options
from moeopt.options.loss_limits import LANGUAGE, OUTPUTS
from moeopt.recognise.routing_types import RoutingForm
from moeopt.rewrite.install import RewrittenForward, live_bank, rewritten_forward
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.value_types import PyObject
from moeopt.verification.loss import BlockLoss, Loss, LossFigures, is_language
from moeopt.verification.loss_text import judged
from moeopt.verification.model import run_plain

_ALL, _REFERENCE = "all of them", "all of them in int8 per channel"  # no module path has spaces
Bank = tuple[Any, Any]
Ids = dict[tuple[str, int], list[Tensor]]
"""By block and bank, the experts that each call chose, (T, K)."""


def data_of(model: nn.Module, call: ArgsKwargs, options: Options) -> list[ArgsKwargs]:
    """The calls that the loss is measured on: ``data=``, or the example inputs; none where nothing is quantised.

    Raises:
        UsageError: ``data`` is no data, or ``limit`` names figures that the model has not.
    """
    if options.quantize is None:
        return []
    calls = [call]
    if options.data is not None:
        calls = [in_order(model, without_cache(model, one)) for one in batches(options.data, "measure")]
    if options.data is not None or options.limit is not None:
        check_limit(model, calls, options.limit)
    return calls


def check_limit(model: nn.Module, calls: Sequence[ArgsKwargs], limit: Mapping[str, float] | None) -> bool:
    """Whether ``model`` is a language model, by what it returns on the first call.

    Raises:
        UsageError: the limit names figures of the other kind of model; the model does not run on the data.
    """
    try:
        output = run_plain(model, *calls[0])
    except Exception as err:
        raise UsageError(f"the model does not run on data= ({type(err).__name__}: {str(err)[:200]})") from err
    language = is_language(output, calls[0])
    foreign = [key for key in limit or () if key in (OUTPUTS if language else LANGUAGE)]
    if foreign:
        has = ", ".join(LANGUAGE if language else OUTPUTS)
        what = "returns next-token logits" if language else "returns no next-token logits for token ids"
        raise UsageError(f"limit names {foreign[0]}, and the model {what}: give limits of {has} or ids_changed")
    return language


def measure_loss(
    source: nn.Module,
    twin: nn.Module,
    calls: Sequence[ArgsKwargs],
    routed: Mapping[str, Sequence[bool]],
    options: Options,
) -> Loss:
    """``certificate.loss``.

    Args:
        source: the original.
        twin: its rewritten copy, with codes beside the floats.
        calls: the data.
        routed: by module path, of each bank of that block, whether a router chooses its experts.
    """
    blocks = {p: f for p, m in twin.named_modules() if (f := rewritten_forward(m)) is not None and _codes(f)}
    variants = {path: {path: list(f.banks)} for path, f in blocks.items()}
    variants[_ALL] = {path: list(f.banks) for path, f in blocks.items()}
    variants[_REFERENCE] = {path: _in_int8(f) for path, f in blocks.items()}
    meter = _Meter(source, twin, blocks, routed, variants, check_limit(source, calls, None))
    for number, call in enumerate(calls):
        options.say(f"measuring what quantising loses, call {number + 1} of {len(calls)}")
        meter.run(call)
    whole, reference, ids = meter.figures[_ALL], meter.figures[_REFERENCE], meter.ids
    loss: Loss = Loss(
        **whole.figures(),  # type: ignore[typeddict-item]
        standard_errors=whole.standard_errors(options.seed), tokens=whole.tokens, sequences=len(whole.distances),
        data="the example inputs" if options.data is None else f"{len(calls)} call{'s' * (len(calls) > 1)} of data=",
        reference=reference.figures(), reference_errors=reference.standard_errors(options.seed),
        blocks=[_block_loss(path, f, meter.figures[path], ids, meter.base_ids) for path, f in blocks.items()],
    )  # fmt: skip
    compared, differ = (sum(b[key] for b in loss["blocks"]) for key in ("ids_compared", "ids_differ"))
    loss["ids_changed"] = differ / compared if compared else 0.0
    loss["limit"] = dict(options.limit or {})
    loss["missed"] = judged(loss, loss["limit"])
    return loss


def is_routed(found: PyObject) -> bool:
    """Whether a router chooses the experts of a recognised sum; groups of a dense FFN are all active."""
    return found.routing.form is not RoutingForm.EVERY_GROUP


def _codes(forward: RewrittenForward) -> list[LiveCodes]:
    return [bank for bank, _ in forward.banks if isinstance(bank, LiveCodes)]


def _floats(forward: RewrittenForward) -> list[Bank]:
    module = forward.module
    return [
        (live_bank(module, bank.experts, spec), spec) if isinstance(bank, LiveCodes) else (bank, spec)
        for bank, spec in forward.banks
    ]


def _in_int8(forward: RewrittenForward) -> list[Bank]:
    """The reference scheme for the banks that are quantised."""
    module = forward.module
    return [
        (LiveCodes(module, number, bank.experts, spec, INT8_CHANNEL), spec)
        if isinstance(bank, LiveCodes)
        else (bank, spec)
        for number, (bank, spec) in enumerate(forward.banks)
    ]


def whole_loss(original: nn.Module, lossy: PyObject, call: ArgsKwargs, limit: Mapping[str, float]) -> Loss:
    """The loss of a model of which nothing is known but what it returns, on one call; no block is told apart."""
    want = run_plain(original, *call)
    figures = LossFigures(is_language(want, call))
    figures.add(want, run_plain(lossy, *call), call)
    loss: Loss = Loss(
        **figures.figures(),  # type: ignore[typeddict-item]
        standard_errors=figures.standard_errors(0), tokens=figures.tokens, sequences=len(figures.distances),
        data="the inputs that were given", limit={k: v for k, v in limit.items() if k != "ids_changed"},
    )  # fmt: skip
    loss["missed"] = judged(loss, loss["limit"])
    return loss


class _Meter:
    """Runs the twin with some of its banks in codes and compares with the original."""

    def __init__(
        self, source: nn.Module, twin: nn.Module, blocks: dict[str, RewrittenForward],
        routed: Mapping[str, Sequence[bool]], variants: Mapping[str, Mapping[str, list[Bank]]], language: bool,
    ) -> None:  # fmt: skip
        self.source, self.twin, self.blocks, self.routed, self.variants = source, twin, blocks, routed, variants
        self.floats = {path: _floats(forward) for path, forward in blocks.items()}
        self.figures = {name: LossFigures(language) for name in variants}
        self.base_ids: Ids = {}
        self.ids: Ids = {}

    def run(self, call: ArgsKwargs) -> None:
        """Add one call to the figures of each variant, and to the experts chosen with no codes and with all."""
        want = run_plain(self.source, *call)
        with self._banks({}), self._noted(self.base_ids):
            run_plain(self.twin, *call)
        for name, quantized in self.variants.items():
            with self._banks(quantized), self._noted(self.ids) if name == _ALL else contextlib.nullcontext():
                got = run_plain(self.twin, *call)
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


def _block_loss(path: str, forward: RewrittenForward, alone: LossFigures, ids: Ids, base: Ids) -> BlockLoss:
    codes = _codes(forward)
    compared = differ = 0
    for key, before in base.items():
        if key[0] == path and key in ids:
            for a, b in zip(before, ids[key], strict=True):
                compared += a.numel()
                differ += int((~(a[:, :, None] == b[:, None, :]).any(-1)).sum())
    return BlockLoss(
        name=path or type(forward.module).__name__,
        format=str(codes[0].format.w_out.format),
        bytes=sum(c.nbytes for c in codes),
        float_bytes=sum(c.float_bytes for c in codes),
        figures=alone.figures(),
        ids_compared=compared,
        ids_differ=differ,
    )

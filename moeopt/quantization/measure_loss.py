"""What quantising lost on a user's data: the original beside its twin with each block, and with all blocks, in codes.

    base        the original's own code                          the outputs that all others are compared with
    float       the rewritten twin on its floats                 the choices of experts that others are compared with
    block b     the twin with the codes of block b alone         what that block costs
    all         the twin with all codes                          ``certificate.loss``
    reference   the twin with all of these blocks in int8 per channel, a scheme that everybody knows
nearest     where codes were found by another method: the twin with the same formats rounded to nearest

One call of the data at a time: the outputs of one call are all that is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.find.batches import batches
from moeopt.find.example_inputs import in_order, without_cache
from moeopt.ir.weight_format import INT8_CHANNEL, WeightFormat
from moeopt.options import Options
from moeopt.options.loss_limits import LANGUAGE, OUTPUTS
from moeopt.options.quant_plan import NEAREST
from moeopt.pipeline.accept import moved
from moeopt.quantization.loss_meter import ALL, Bank, Ids, LossMeter
from moeopt.quantization.quantized_products import QuantizedProduct, QuantizedProducts
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.value_types import PyObject
from moeopt.verification.loss import BlockLoss, Loss, LossFigures, is_language
from moeopt.verification.loss_text import judged
from moeopt.verification.model import run_plain

_REFERENCE, _NEAREST = "all of them in int8 per channel", "all of them to nearest"  # no module path has spaces


def data_of(model: nn.Module, call: ArgsKwargs, options: Options) -> list[ArgsKwargs]:
    """The calls that the loss is measured on: ``data=``, or the example inputs; none where nothing is quantised.

    Raises:
        UsageError: ``data`` is no data, or ``limit`` names figures that the model has not.
    """
    if options.quantize is None:
        return []
    calls = [call]
    if options.data is not None:
        calls = [moved(in_order(model, without_cache(model, one)), options) for one in batches(options.data, "measure")]
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
    products: QuantizedProducts | None = None,
    engine: Callable[..., Any] | None = None,
) -> Loss:
    """``certificate.loss``.

    Args:
        source: the original.
        twin: its rewritten copy, with codes beside the floats.
        calls: the data.
        routed: by module path, of each bank of that block, whether a router chooses its experts.
        products: the twin's quantised products outside of its blocks; None means none.
        engine: what runs, where that is another approximation than ``twin`` with all codes; None: it is not.
    """
    products = QuantizedProducts() if products is None else products
    blocks = {p: f for p, m in twin.named_modules() if (f := rewritten_forward(m)) is not None and _codes(f)}
    variants = {path: {path: list(f.banks)} for path, f in blocks.items()}
    variants[ALL] = {path: list(f.banks) for path, f in blocks.items()}
    schemes = {_REFERENCE: "int8"}
    variants[_REFERENCE] = {path: _rounded_to_nearest(f, INT8_CHANNEL) for path, f in blocks.items()}
    if options.quantize is not None and options.quantize.method != NEAREST:
        schemes[_NEAREST] = "nearest"
        variants[_NEAREST] = {path: _rounded_to_nearest(f) for path, f in blocks.items()}
    groups = {name: [name] for name in products.groups}
    groups |= {name: [*products.groups] for name in (ALL, *schemes)}
    variants |= {name: {} for name in products.groups}
    language = check_limit(source, calls, None)
    meter = LossMeter(source, twin, blocks, routed, variants, language, products, groups, schemes)
    for number, call in enumerate(calls):
        options.say(f"measuring what quantising loses, call {number + 1} of {len(calls)}")
        meter.run(call, engine)
    whole, reference, ids = meter.figures[ALL], meter.figures[_REFERENCE], meter.ids
    loss: Loss = Loss(
        **whole.figures(),  # type: ignore[typeddict-item]
        standard_errors=whole.standard_errors(options.seed), tokens=whole.tokens, sequences=len(whole.distances),
        data="the example inputs" if options.data is None else f"{len(calls)} call{'s' * (len(calls) > 1)} of data=",
        reference=reference.figures(), reference_errors=reference.standard_errors(options.seed),
        blocks=[
            *(_block_loss(path, f, meter.figures[path], ids, meter.base_ids) for path, f in blocks.items()),
            *(_products_loss(name, held, meter.figures[name]) for name, held in products.groups.items()),
        ],
    )  # fmt: skip
    if _NEAREST in meter.figures:
        loss["nearest"] = meter.figures[_NEAREST].figures()
    loss["ids_changed"] = changed_share(ids, meter.base_ids)
    loss["limit"] = dict(options.limit or {})
    loss["missed"] = judged(loss, loss["limit"])
    return loss


def _codes(forward: RewrittenForward) -> list[LiveCodes]:
    return [bank for bank, _ in forward.banks if isinstance(bank, LiveCodes)]


def _rounded_to_nearest(forward: RewrittenForward, format: WeightFormat | None = None) -> list[Bank]:
    """The banks that are quantised, rounded to nearest in ``format``; None: in the formats that they have.

    Codes of a checkpoint stay: nothing rounded them.
    """
    module = forward.module
    return [
        (LiveCodes(module, number, bank.experts, spec, format or bank.format), spec)
        if isinstance(bank, LiveCodes) and not (format is None and bank.exact)
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


def changed_share(ids: Ids, base: Ids) -> float:
    """The share of choices of experts that came out otherwise; 0 where there are none."""
    compared, differ = _changed(ids, base)
    return differ / compared if compared else 0.0


def _changed(ids: Ids, base: Ids) -> tuple[int, int]:
    """How many choices there are, and how many of them are not among those of the same token."""
    compared = differ = 0
    for key, before in base.items():
        for a, b in zip(before, ids.get(key, []), strict=False):
            compared += a.numel()
            differ += int((~(a[:, :, None] == b[:, None, :]).any(-1)).sum())
    return compared, differ


def _block_loss(path: str, forward: RewrittenForward, alone: LossFigures, ids: Ids, base: Ids) -> BlockLoss:
    codes = _codes(forward)
    compared, differ = _changed(ids, {key: before for key, before in base.items() if key[0] == path})
    return BlockLoss(
        name=path or type(forward.module).__name__,
        format=str(codes[0].format.w_out.format),
        bytes=sum(c.nbytes for c in codes),
        float_bytes=sum(c.float_bytes for c in codes),
        figures=alone.figures(),
        ids_compared=compared,
        ids_differ=differ,
    )


def _products_loss(name: str, held: Sequence[QuantizedProduct], alone: LossFigures) -> BlockLoss:
    """The products that one module holds, told as one."""
    return BlockLoss(
        name=name,
        format=", ".join(dict.fromkeys(str(one.codes.format) for one in held)),
        bytes=sum(one.codes.held.nbytes for one in held),
        float_bytes=sum(one.float_bytes for one in held),
        figures=alone.figures(),
    )

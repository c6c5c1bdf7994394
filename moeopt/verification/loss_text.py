"""A loss in plain lines, its limits judged, and its JSON read back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from moeopt.errors import BundleError
from moeopt.listed import listed
from moeopt.options.loss_limits import AT_LEAST, FIGURES, missed
from moeopt.sizes import in_megabytes
from moeopt.value_types import JsonValue
from moeopt.verification.loss import BlockLoss, Loss

COSTLIEST = 3
"""How many blocks a missed limit names."""
_NONE: Mapping[str, str] = MappingProxyType({})


def judged(loss: Loss, limit: Mapping[str, float]) -> list[str]:
    """A sentence for each limit that the loss does not keep, with the blocks that cost most."""
    told = []
    for key, most in limit.items():
        value = float(loss.get(key, math.nan))  # type: ignore[arg-type]
        if not loss.get("tokens", 1):
            told.append(f"{key} was not measured: {_no_token(loss)}")
        elif missed(key, value, most):
            word = "at least" if key in AT_LEAST else "at most"
            told.append(f"{key} is {value:.4g}, and limit allows {word} {most:.4g}{_costliest(loss, key)}")
    return told


def _no_token(loss: Loss) -> str:
    return (
        f"no token of {loss.get('data', 'the data')} counts (there is none, or attention_mask hides all, or the "
        "original's outputs are no numbers); give data= with tokens"
    )


def cost_of(block: BlockLoss) -> float:
    """What quantising this block alone loses: mean KL, or mean relative distance where there are no logits."""
    figures = block["figures"]
    return figures.get("kl_mean", figures.get("error_mean", 0.0))


def quantized_note(quantized: Mapping[str, str], sizes: Sequence[tuple[int, int]], left: Sequence[str]) -> list[str]:
    """Sentences for a report: the memory that codes take and floats took, by (codes, floats) bytes of each block, and
    what stayed float."""
    told = []
    if quantized:
        codes, floats = (in_megabytes(sum(size[i] for size in sizes)) for i in (0, 1))
        count = f"{len(quantized)} block{'s' * (len(quantized) > 1)}"
        told.append(
            f"the experts of {count} are quantised, {floats} of floats to {codes}: this is another "
            "function near the original's; certificate.loss says how near"
        )
    return told + [f"not quantised: {sentence}" for sentence in left]


def few_rows_note(few: Mapping[str, int], experts: int) -> list[str]:
    """A sentence on how many experts of blocks, by name, too few rows reached, of all ``experts``."""
    if not few:
        return []
    where = listed([f"{name}: {count}" for name, count in few.items()], 4)
    return [
        f"method='gptq': too few rows of calibration= reach {sum(few.values())} of {experts} experts ({where}), whose "
        "scales were searched instead: give more calls"
    ]


def published_note(sizes: Sequence[tuple[int, int]], home: str) -> str:
    """A sentence on experts that have the codes of their ``home``, by (codes, floats) bytes of each block."""
    codes, floats = (in_megabytes(sum(size[i] for size in sizes)) for i in (0, 1))
    count = f"{len(sizes)} block{'s' * (len(sizes) > 1)}"
    return (
        f"the experts of {count} have the codes of the {home}, {codes} in place of {floats} of "
        "floats: the weights are the same to the bit, so nothing is lost"
    )


def _costliest(loss: Loss, key: str) -> str:
    blocks = sorted(loss.get("blocks", ()), key=cost_of, reverse=True)[:COSTLIEST]
    if not blocks:
        return ""
    word = "kl_mean" if "kl_mean" in blocks[0]["figures"] else "error_mean"
    named = ", ".join(f"{b['name']} ({b['format']}, alone {word} {cost_of(b):.2g})" for b in blocks)
    return f"; the blocks that cost most: {named}"


def loss_lines(
    quantized: Mapping[str, str], loss: Loss, products: Mapping[str, str] = _NONE, method: str = ""
) -> Iterator[str]:
    """The loss as text, one statement a line; ``method``: how floats became codes."""
    parts: list[str] = []
    for word, formats in (("block", quantized), ("product", products)):
        if formats:
            schemes = ", ".join(dict.fromkeys(formats.values()))
            parts.append(f"{len(formats)} {word}{'s' * (len(formats) > 1)} to {schemes}")
    what = ", ".join(parts) or "no weight, activations alone"
    what += f" by {method}" if parts and method not in ("", "nearest") else ""
    if not loss:
        yield f"quantised: {what}; what that lost was not measured"
        return
    yield f"quantised: {what}; what that lost, on {loss['data']} ({loss['tokens']} tokens):"
    if not loss["tokens"]:
        yield f"  not measured: {_no_token(loss)}"
    errors, reference, limit = loss.get("standard_errors", {}), loss.get("reference", {}), loss.get("limit", {})
    nearest = loss.get("nearest", {})
    for key in FIGURES:
        if key not in loss:
            continue
        value = f"{loss[key]:.4g}" + (f" +- {errors[key]:.1g}" if key in errors else "")  # type: ignore[literal-required]
        beside = f"; to nearest {nearest[key]:.4g}" if key in nearest else ""
        beside += f"; int8 per channel {reference[key]:.4g}" if key in reference else ""
        bound = f"; limit {limit[key]:.4g}" if key in limit else ""
        yield f"  {key}: {value}{beside}{bound}"
    for block in sorted(loss.get("blocks", ()), key=cost_of, reverse=True):
        told = [f"{k} {v:.2g}" for k, v in block["figures"].items() if k in ("kl_mean", "error_mean", "top1")]
        figures = ", ".join(told) or "not measured"
        ids = f"; ids changed {block['ids_differ']} of {block['ids_compared']}" if block.get("ids_compared") else ""
        size = f"; {in_megabytes(block['bytes'])}, as floats {in_megabytes(block['float_bytes'])}"
        yield f"  {block['name']}: {block['format']}; alone {figures}{ids}{size}"
    for sentence in loss.get("missed", ()):
        yield f"  LIMIT MISSED: {sentence}"


def activation_lines(rounded: Mapping[str, float]) -> Iterator[str]:
    """What a certificate says of rounded activations, one statement a line."""
    if rounded:
        yield (
            f"activations: {rounded['products']:.0f} products of codes round what they read to int8, which the figures "
            "above count in; all that passed was verified with float activations before. Each of the "
            f"{rounded['kinds']:.0f} kinds of products computes just that ({rounded['error_eps']:.2g} eps off); it "
            f"moves a product by up to {rounded['product']:.2g}, and the outputs by up to {rounded['outputs']:.2g}"
        )


_WORDS = ("inf", "-inf", "nan")


def revived_loss(body: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A loss from JSON, its numbers numbers again: strict JSON has "inf" and "nan" as text.

    Raises:
        BundleError: a key that no loss has.
    """
    unknown = sorted(set(body) - set(Loss.__annotations__))
    if unknown:
        raise BundleError(f"the certificate cannot be read: a loss has no {unknown[0]!r:.60}")

    def number(value: JsonValue) -> JsonValue:
        if isinstance(value, dict):
            return {key: number(one) for key, one in value.items()}
        return float(value) if isinstance(value, str) and value in _WORDS else value

    tables = ("standard_errors", "reference", "reference_errors", "nearest", "limit")
    out = {key: number(value) if key in FIGURES or key in tables else value for key, value in body.items()}
    for block in out["blocks"] if isinstance(out.get("blocks"), list) else ():
        if isinstance(block, dict) and isinstance(block.get("figures"), dict):
            block["figures"] = number(block["figures"])
    return out

"""The figures that say what quantising lost, and the limits that a user may set on them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moeopt.errors import UsageError
from moeopt.options.quant_plan import GPTQ, NEAREST
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from moeopt.options.fields import Options

LANGUAGE = {
    "kl_mean": "KL divergence of the next-token distributions, mean, in nats",
    "kl_p99": "KL divergence, 99th percentile",
    "kl_p999": "KL divergence, 99.9th percentile",
    "kl_max": "KL divergence, maximum",
    "top1": "share of positions whose likeliest next token is the same",
    "perplexity_ratio": "perplexity of the quantised model over that of the original",
}
"""For models whose outputs hold next-token logits."""
OUTPUTS = {
    "error_mean": "relative L2 distance of the outputs a token, mean",
    "error_p99": "relative distance, 99th percentile",
    "error_p999": "relative distance, 99.9th percentile",
    "error_max": "relative distance, maximum",
}
"""For all other models."""
ROUTING = {"ids_changed": "share of the routers' choices of experts that came out otherwise"}
FIGURES = {**LANGUAGE, **OUTPUTS, **ROUTING}
"""Every figure by its key in ``certificate.loss`` and in ``limit=``."""
AT_LEAST = ("top1",)
"""Figures of which more is better; a limit on any other is a maximum."""


def missed(key: str, value: float, limit: float) -> bool:
    """Whether ``value`` does not keep ``limit``; a figure that is no number keeps none."""
    return not (value >= limit if key in AT_LEAST else value <= limit)


def as_limit(value: PyObject, name: str = "limit") -> dict[str, float] | None:
    """``limit=`` checked, or what else is called ``name``: which figures, and the least or most that each may be."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise UsageError(
            f"{name}={value!r}: it must map figures to numbers, like {{'kl_mean': 0.01, 'top1': 0.97}}; the figures "
            f"are {', '.join(FIGURES)}"
        )
    for key, number in value.items():
        if key not in FIGURES:
            close = difflib.get_close_matches(str(key), list(FIGURES), n=1, cutoff=0.5)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"{name} names {key!r}, which is no figure: {meant}the figures are {', '.join(FIGURES)}")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number < 0:
            raise UsageError(f"{name}[{key!r}]={number!r}: it must be a number, 0 or more")
        if key in ("top1", "ids_changed") and number > 1:
            raise UsageError(f"{name}[{key!r}]={number!r}: it is a share, between 0 and 1")
    kinds = [group for group in (LANGUAGE, OUTPUTS) if any(key in group for key in value)]
    if len(kinds) > 1:
        a, b = (next(key for key in value if key in group) for group in kinds)
        raise UsageError(
            f"limit names {a} and {b}: a model has next-token logits, and then {', '.join(LANGUAGE)}, or it has none, "
            f"and then {', '.join(OUTPUTS)}"
        )
    return {key: float(number) for key, number in value.items()}


def check_quantize(options: Options) -> None:
    """``UsageError`` for choices that mean something only with ``quantize``, and for a gate that nothing measures."""
    for name in ("limit", "data", "calibration"):
        if getattr(options, name) is not None and options.quantize is None:
            raise UsageError(
                f"{name} is about what quantising loses, and nothing is quantised: give quantize='int8' (or another "
                "format) as well"
            )
    if options.quantize is not None:
        _check_calibration(options)
    if options.limit is not None and options.verify == "off":
        raise UsageError("limit is a gate, and verify='off' measures nothing: leave one of them out")
    if options.quantize is not None and "quantize_experts" in options.skip_passes:
        raise UsageError("quantize asks for the pass quantize_experts, and skip_passes leaves it out: drop one of them")


def _check_calibration(options: Options) -> None:
    method = options.quantize.method
    if method == GPTQ and options.calibration is None:
        raise UsageError(
            "method='gptq' rounds by the rows that reach each expert, and there are none: give calibration=, calls of "
            "your own text (a few thousand tokens, others than data=), or method='search', which needs none"
        )
    if method == NEAREST and options.calibration is not None:
        raise UsageError(
            "calibration is what the methods 'gptq' and 'search' weigh by, and this plan rounds to nearest: give "
            "quantize=QuantPlan(default='int4', method='gptq'), or leave out calibration="
        )

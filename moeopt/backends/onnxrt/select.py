"""Which lowering is quickest for a site: an estimate from bytes, FLOPs and nodes, or a measurement.

Each lowering says what one call does (``Lowering.cost``); this module knows what that takes on a kind of machine. Each
node costs a fixed time to start, and a time to load that is spread over ``CALLS`` calls. A lowering's time is

    max(bytes / read, FLOPs / gemm) * slowdown + nodes * node + syncs * sync + nodes * LOAD / CALLS

summed over the token counts that the engine is expected to see. The constants for CPU are of ONNX Runtime 1.31 on a
2-core x86 machine (``benchmarks/onnx_blocks.py``); those for GPU providers are round figures of data sheets, and were
not measured. Only their ratios matter here, and ``tune=True`` measures instead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from moeopt.backends.onnxrt.lowerings import (
    FUNCTION_LOWERINGS,
    LOWERINGS,
    MAPPED_LOWERINGS,
    QUANTIZED_LOWERINGS,
    ROUNDED_LOWERINGS,
)
from moeopt.backends.onnxrt.session import Session
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.lowerings.codes import is_quantized
from moeopt.lower.onnx.plan import LoweringChoice

TOKENS = (1, 4, 16, 128)
"""Token counts that count alike when the user names none: decode, small batches, a prompt."""


@dataclass(frozen=True)
class Speed:
    """Of one kind of machine.

    Args:
        read: bytes a second.
        gemm: FLOPs a second.
        node: seconds to start a node.
        sync: seconds to wait for sizes that the host must know.
    """

    read: float
    gemm: float
    node: float
    sync: float = 0.0


CPU, GPU = Speed(20e9, 100e9, 2e-6), Speed(1e12, 3e13, 5e-6, 2e-5)
LOAD = 2e-3
"""Seconds to load a node."""
CALLS = 1000
REPEATS = 5


def ranked(
    site: ExpertsNode,
    provider: str,
    tokens: tuple[int, ...] | None = None,
    open_session: Callable[[ExpertsNode, Lowering], Session] | None = None,
    without: Mapping[str, str] = MappingProxyType({}),
    mapped: bool = False,
    rounds: bool = False,
) -> list[LoweringChoice]:
    """Every lowering: those that fit first, the quickest ahead.

    Args:
        tokens: the token counts that the engine will see; None means ``TOKENS``.
        open_session: given, each lowering is measured in a session that it opens, load time included.
        without: names of lowerings that the engine leaves out -> why.
        mapped: forms of quantised experts with which a session makes no floats of the file's codes come first.
        rounds: products of codes round their activations: forms that read codes come first.
    """
    counts = tokens or TOKENS
    if isinstance(site.spec, RowFunction):
        return [_only(form, site, provider) for form in FUNCTION_LOWERINGS]
    first = ROUNDED_LOWERINGS if rounds else MAPPED_LOWERINGS if mapped else ()
    choices, kept = [], {low.name: low for low in first} if is_quantized(site) else {}
    forms = {low.name: low for low in (QUANTIZED_LOWERINGS if is_quantized(site) else LOWERINGS)}
    for lowering in (kept | forms).values():
        refusal = lowering.refuses(site, provider)
        if lowering.name in without:
            refusal = f"portable=True: {without[lowering.name]}"
        if refusal:
            choices.append(LoweringChoice(lowering.name, None, refusal))
        elif open_session is None:
            seconds = sum(estimate(site, lowering, T, provider) for T in counts)
            choices.append(LoweringChoice(lowering.name, lowering, f"estimated {_ms(seconds)}", seconds))
        else:
            seconds = measure(site, lowering, counts, open_session)
            choices.append(LoweringChoice(lowering.name, lowering, f"measured {_ms(seconds)}", seconds))
    return sorted(choices, key=lambda c: (c.lowering is None, bool(kept) and c.name not in kept, c.seconds))


def _only(lowering: Lowering, site: ExpertsNode, provider: str) -> LoweringChoice:
    refusal = lowering.refuses(site, provider)
    return LoweringChoice(
        lowering.name, None if refusal else lowering, refusal or "the form of any function of a row", 0.0
    )


def estimate(site: ExpertsNode, lowering: Lowering, tokens: int, provider: str = "cpu") -> float:
    """Seconds of one call with ``tokens`` tokens, from the lowering's own cost; see the module's docstring."""
    cost, speed = lowering.cost(site, tokens, provider), CPU if provider == "cpu" else GPU
    work = max(cost.moved / speed.read, cost.flops / speed.gemm)
    return work * cost.slowdown + cost.kernels * (speed.node + LOAD / CALLS) + cost.syncs * speed.sync


def measure(
    site: ExpertsNode,
    lowering: Lowering,
    counts: tuple[int, ...],
    open_session: Callable[[ExpertsNode, Lowering], Session],
) -> float:
    """Seconds of one call for each of ``counts``, summed, and the load time spread over ``CALLS`` calls."""
    started = time.perf_counter()
    session = open_session(site, lowering)
    total = (time.perf_counter() - started) / CALLS
    E, generator = site.bank.num_experts, torch.Generator().manual_seed(0)
    for T in counts:
        scores = torch.rand(T, E, generator=generator)
        weights, ids = scores.topk(min(site.top_k, E))
        feeds = {"x": torch.randn(T, site.features, generator=generator).to(site.dtype), "ids": _wide(ids, site.top_k)}
        feeds["weights"] = _wide(weights, site.top_k).to(site.weights_dtype)
        times = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            session.run(feeds)
            times.append(time.perf_counter() - started)
        total += statistics.median(times[1:])  # the first call warms up
    return total


def _wide(table: torch.Tensor, columns: int) -> torch.Tensor:
    """``table`` with its columns repeated up to ``columns``: a block may name an expert twice."""
    return table[:, torch.arange(columns) % table.shape[1]].contiguous()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"

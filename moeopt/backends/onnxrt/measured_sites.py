"""Blocks that stand for a graph's experts where two forms are timed, which copy no weights and take milliseconds.

A block of many experts costs by two things: the weights that are read and multiplied, and what each expert costs
whether or not a token goes there (a dozen small nodes each in a graph that is written out). So a few experts of the
true sizes are run, each with as many rows as one of the block's own has, as often as the block has more of them that
are hit; and beside these so many experts with hardly any weights as no token goes to.

Shape legend: T tokens, K chosen per token, E experts, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices

BYTES = 64 << 20
"""Of the experts of true size: more than a cache holds. A block of fewer bytes is measured whole."""
NARROW = 32
"""Features and neurons of the experts with hardly any weights."""


MOST_RUNS = 8
"""Of the few experts in one call; a call that would take more is timed in proportion."""


@dataclass(frozen=True)
class MeasuredRun:
    """A part of one timed call.

    Attributes:
        block: what runs.
        feeds: its ``x`` (T', H), ``ids`` and ``weights`` (T', K).
        times: how often it runs.
    """

    block: ExpertsNode
    feeds: dict[str, Tensor]
    times: int


def measured_calls(site: ExpertsNode, counts: Sequence[int]) -> list[list[MeasuredRun]]:
    """For each number of tokens the runs whose times together stand for a call of ``site``."""
    few = _few(site)
    E, K, held, top_k = site.bank.num_experts, site.top_k, few.bank.num_experts, few.top_k
    if held == E:
        return [[MeasuredRun(few, _feeds(few, T), 1)] for T in counts]
    calls = []
    narrow: dict[int, ExpertsNode] = {}
    for T in counts:
        rows = max(1, round(T * K * held / (E * top_k)))
        times = max(1, round(T * K / (rows * top_k)))
        made = min(times, MOST_RUNS)
        call = [MeasuredRun(few, _feeds(few, rows), made)]
        idle = round((E - times * held) * made / times)
        if idle > 0:
            block = narrow.setdefault(idle, _narrow(site, idle))
            call.append(MeasuredRun(block, _feeds(block, 1), 1))
        calls.append(call)
    return calls


def _feeds(one: ExpertsNode, rows: int) -> dict[str, Tensor]:
    """Inputs of a measured block, whose ids go round its experts."""
    E, K = one.bank.num_experts, one.top_k
    return {
        "x": torch.full((rows, one.features), 0.5, dtype=one.dtype),
        "ids": (torch.arange(rows)[:, None] * K + torch.arange(K)) % E,
        "weights": torch.full((rows, K), 0.5, dtype=one.weights_dtype),
    }


def _few(site: ExpertsNode) -> ExpertsNode:
    """A block of the site's function and sizes, with as many experts as ``BYTES`` hold."""
    bank = site.bank
    if isinstance(bank, QuantizedExpertWeights):
        E = min(bank.num_experts, max(2, BYTES * bank.num_experts // max(1, bank.nbytes)))
        *w_in, w_out = (QuantizedMatrices.of([m[e] for e in range(E)]) for m in (*bank.w_in_q, bank.w_out_q))
        few: object = QuantizedExpertWeights(w_in, w_out, layouts=bank.layouts, dtype=bank.dtype)
    else:
        one = [*bank.w_in(0), bank.w_out(0)]
        E = max(2, min(bank.num_experts, BYTES // max(1, sum(4 * w.numel() for w in one))))
        few = _stacked(E, [tuple(w.shape) for w in one], site.dtype)
    return dataclasses.replace(site, bank=few, top_k=min(site.top_k, E))


def _narrow(site: ExpertsNode, E: int) -> ExpertsNode:
    """A block of the site's function and of ``E`` experts with hardly any weights."""
    bank = site.bank
    glued = 2 if site.spec.gated and site.spec.rows != "separate" else 1
    if isinstance(bank, QuantizedExpertWeights):
        held = [(matrix.matrix.format, glued * NARROW) for matrix in bank.w_in_q] + [
            (bank.w_out_q.matrix.format, NARROW)
        ]
        *w_in, w_out = (
            QuantizedMatrices.of([quantize(torch.full((out, NARROW), 0.01), format)] * E) for format, out in held
        )
        narrow: object = QuantizedExpertWeights(w_in, w_out, layouts=bank.layouts, dtype=bank.dtype)
    else:
        first = (glued * NARROW, NARROW) if site.spec.w_in_layout == "oi" else (NARROW, glued * NARROW)
        narrow = _stacked(E, [first] * len(bank.w_in(0)) + [(NARROW, NARROW)], site.dtype)
    return dataclasses.replace(site, bank=narrow, top_k=1)


def _stacked(E: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> StackedExpertWeights:
    """Experts of these shapes, no two matrices alike: of equal ones ONNX Runtime keeps one packed copy for all."""
    *w_in, w_out = (
        torch.linspace(0.01 + place, 0.02 + place, E).to(dtype).view(E, 1, 1).expand(E, *shape).contiguous()
        for place, shape in enumerate(shapes)
    )
    return StackedExpertWeights(w_in, w_out)

"""One expert after another on every token, in an ONNX ``Loop``: the least memory, and E times an expert's work.

    y = 0;  for e in 0..E-1:  y += where(e chosen by the token, expert_e(x) w_e, 0)

With weights on the input each slot has rows of its own, so N = T K rows go through each expert. Where, not a
product with zero: an expert that overflows on a token that did not choose it must not leak. Shape legend:
T tokens, K chosen per token, R rows (T, or N with weights on the input), H hidden, D output width.

    Nodes      about 30 for any E, those of the body among them
    Numerics   the sum runs over e in the accumulator's dtype
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moeopt.backends.tensorrt.cost import COPIED, GEMM_ROOM, sizes_for
from moeopt.backends.tensorrt.lowerings import pairs
from moeopt.backends.tensorrt.lowerings.looped import looped
from moeopt.backends.tensorrt.lowerings.stacked import Stacked
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of
from moeopt.value_types import OnnxValue


class Loop:
    """The lowering ``"loop"``: carries every spec."""

    name = "loop"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        return banks.refuses_sizes(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        s = sizes_for(site, tokens)
        # with weights on the input, the output cannot take the room of the first product
        middle = s.O + s.I + s.D if site.spec.weight_on == "input" else s.I + max(s.O, s.D)
        memory = s.expert + s.R * (s.compute * middle + s.accum * s.D + s.wider) + s.input_rows
        moved = COPIED * s.E * s.expert + 2 * s.E * s.R * s.row
        return Cost(moved, 2.0 * s.weights * s.E * s.R, kernels=6 + 6 * s.E, memory=memory + GEMM_ROOM)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        stacked, size = Stacked(graph, site), banks.sizes_of(site)
        one = OneExpert(
            lambda x_RH, e: stacked.experts(x_RH, e, rank=2), types_of(site).compute, size.E, size.H, size.D
        )
        return loop_over_experts(graph, site, one, x, ids, weights)


@dataclass(frozen=True)
class OneExpert:
    """What runs at each turn.

    Args:
        on: the value (R, D) of the expert that an int64 scalar names on rows (R, H).
        reads: the dtype of the rows.
    """

    on: Callable[[OnnxValue, OnnxValue], OnnxValue]
    reads: torch.dtype
    E: int
    H: int
    D: int


def loop_over_experts(
    graph: Builder, site: ExpertsNode, one: OneExpert, x: OnnxValue, ids: OnnxValue, weights: OnnxValue
) -> OnnxValue:
    """The nodes of the form around ``one``; returns the value (T, D)."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    spec, types = site.spec, types_of(site)

    def int64(value: OnnxValue) -> OnnxValue:
        return graph.const(value, "int64")

    slots = ids
    if spec.weight_on == "input":
        weighted = pairs.weighted_input(graph, site, x, weights)
        x_RH = cast(graph, graph.op("Reshape", [weighted, int64([-1, one.H])]), types.input_term, one.reads)
        slots = graph.op("Reshape", [ids, int64([-1, 1])], name="slots")
    else:
        x_RH = cast(graph, x, types.x, one.reads)
    zero_w, zero = scalar(graph, 0.0, types.weights), scalar(graph, 0.0, types.accum)

    def one_expert(e: OnnxValue, y_RD: OnnxValue) -> tuple[list[Any], list[Any]]:
        chosen = graph.op("Equal", [slots, e], name="chosen")
        o_RD = one.on(x_RH, e)
        if spec.weight_on == "output":
            w_R1 = graph.op("ReduceSum", [graph.op("Where", [chosen, weights, zero_w]), int64([1])], keepdims=1)
            w_R1 = cast(graph, w_R1, types.weights, types.term)
            o_RD = graph.op("Mul", [cast(graph, o_RD, types.compute, types.term), w_R1], name="weighted")
        o_RD = cast(graph, o_RD, types.term, types.accum)
        o_RD = graph.op("Where", [_any(graph, chosen), o_RD, zero], name="chosen_only")
        return [graph.op("Add", [y_RD, o_RD], name="sum_over_experts")], []

    rows = graph.op("Shape", [slots], start=0, end=1)
    nothing_RD = graph.op("Expand", [zero, graph.op("Concat", [rows, int64([one.D])], axis=0)])
    kind = (from_torch_dtype(types.accum), [None, one.D])
    y = looped(graph, "experts", int64(one.E), [nothing_RD], [kind], one_expert)
    if spec.weight_on == "input":
        y_TKD = graph.op("Reshape", [y, int64([-1, site.top_k, one.D])])
        y = graph.op("ReduceSum", [y_TKD, int64([1])], keepdims=0, name="sum_over_slots")
    if spec.out_of_range == "identity":
        y = graph.op("Add", [y, pairs.identity(graph, site, ids, x, weights)], name="identity")
    return cast(graph, y, types.accum, types.out)


def _any(graph: Builder, chosen_RK: OnnxValue) -> OnnxValue:
    """True where some slot of a row is true (R, 1)."""
    import onnx_ir as ir

    counted = graph.op("Cast", [chosen_RK], to=int(ir.DataType.FLOAT))
    times_R1 = graph.op("ReduceSum", [counted, graph.const([1], "int64")], keepdims=1)
    return graph.op("Greater", [times_R1, graph.const(0, "float32")])

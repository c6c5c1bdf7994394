"""Every expert on every token, as two batched matmuls: for a few experts, or no dynamic shapes at all.

    h_ETO = x_1TH @ W_in_EHO + b;  a = gate(h);  o_ETD = a @ W_out_EID + b;  y_TD = sum_e where(chosen, o w, 0)

Where, not a product with zero: an expert that overflows on a token that did not choose it must not leak.
With weights on the input each slot has its own rows, so K must be 1. Shape legend: T tokens, K chosen per
token, E experts, H hidden, O columns of W_in, I intermediate, D output width.

    Costs      E / K times the multiply-adds; no sort, no Split, no control flow
    Numerics   the sum runs over e in the accumulator's dtype
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import middle, table
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import cast, refuses_types, scalar, types_of, wide
from moeopt.lower.onnx.lowerings.weight_reads import weights_cost
from moeopt.value_types import OnnxValue

MOST_EXPERTS = 16
"""Beyond this many, computing all of them is never the choice."""


class Dense:
    """The lowering ``"dense"``: all of at most 16 experts."""

    name = "dense"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if site.bank.num_experts > MOST_EXPERTS:
            return f"dense computes every expert; {site.bank.num_experts} are more than {MOST_EXPERTS}"
        if site.spec.weight_on == "input" and site.top_k > 1:
            return "weights on the input differ for each of a token's slots; dense carries that for top_k 1 only"
        return refuses_types(site, provider) or banks.refuses_sizes(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        E = site.bank.num_experts
        return weights_cost(site, experts=E, rows=tokens * E, kernels=30)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        spec, types = site.spec, types_of(site)

        def last(value: OnnxValue) -> OnnxValue:
            return graph.op("Unsqueeze", [value, graph.const([-1], "int64")])

        def scaled() -> OnnxValue:
            pair = (cast(graph, x, types.x, types.input_term), cast(graph, weights, types.weights, types.input_term))
            x_T1H = graph.op("Unsqueeze", [pair[0], graph.const([1], "int64")])
            return graph.op("Mul", [x_T1H, last(pair[1])], name="weighted_input")

        chosen_TKE = table.chosen_TKE(graph, site, ids)
        if spec.weight_on == "input":
            x_TH = graph.op("Squeeze", [scaled(), graph.const([1], "int64")])
            x_TH = cast(graph, x_TH, types.input_term, types.compute)
        else:
            x_TH = cast(graph, x, types.x, types.compute)
        o_ETD = _all_experts(graph, site, x_TH)
        by_expert = graph.op("Transpose", [table.any_slot_TE(graph, chosen_TKE)], perm=[1, 0])
        if spec.weight_on == "output":
            w_ET = graph.op("Transpose", [table.weights_TE(graph, site, chosen_TKE, weights)], perm=[1, 0])
            w_ET1 = last(cast(graph, w_ET, types.weights, types.term))
            o_ETD = graph.op("Mul", [cast(graph, o_ETD, types.compute, types.term), w_ET1], name="weighted")
        o_ETD = cast(graph, o_ETD, types.term, types.accum)
        zero = scalar(graph, 0.0, types.accum)
        o_ETD = graph.op("Where", [last(by_expert), o_ETD, zero], name="chosen_only")
        y_TD = graph.op("ReduceSum", [o_ETD, graph.const([0], "int64")], keepdims=0, name="sum_over_experts")
        if spec.out_of_range == "identity":
            beyond_TK = graph.op("GreaterOrEqual", [ids, graph.const(site.bank.num_experts, "int64")])
            same = graph.op("Where", [last(beyond_TK), cast(graph, scaled(), types.input_term, types.accum), zero])
            same_TD = graph.op("ReduceSum", [same, graph.const([1], "int64")], keepdims=0)
            y_TD = graph.op("Add", [y_TD, same_TD], name="identity")
        return cast(graph, y_TD, types.accum, types.out)


def _all_experts(graph: Builder, site: ExpertsNode, x_TH: OnnxValue) -> OnnxValue:
    """Every expert's output on every token (E, T, D), in the compute dtype."""
    bank, spec, size, types = site.bank, site.spec, banks.sizes_of(site), types_of(site)
    compute = types.compute

    def stacked(name: str, read: OnnxValue, *shape: int, dtype: torch.dtype = compute) -> OnnxValue:
        def whole() -> Tensor:
            return torch.stack([read(e).to(dtype) for e in range(size.E)]).reshape(size.E, *shape)

        return graph.weight(name, whole, dtype, (size.E, *shape))

    def add(value: OnnxValue, name: str, read: OnnxValue, width: int) -> OnnxValue:
        return graph.op("Add", [value, stacked(name, read, 1, width)])

    w_in = stacked("gate_up.weight", lambda e: banks.w_in_HO(bank, e, spec), size.H, size.O)
    h_ETO = graph.op("MatMul", [x_TH, w_in], name="gate_up")
    if banks.has_b_in(bank):
        h_ETO = add(h_ETO, "gate_up.bias", lambda e: banks.b_in_O(bank, e, spec, size.O, compute), size.O)
    a_ETI = middle.gate(graph, site, h_ETO, size.O)
    w_out = stacked("down.weight", lambda e: banks.w_out_ID(bank, e, spec), size.I, size.D)
    o_ETD = graph.op("MatMul", [a_ETI, w_out], name="down")
    if banks.has_b_out(bank):
        o_ETD = add(
            o_ETD, "down.bias", lambda e: default_if_none(bank.b_out(e), torch.zeros(size.D, dtype=compute)), size.D
        )
    if spec.out_norm_eps is None:
        return o_ETD
    norm = None
    if any(bank.norm(e) is not None for e in range(size.E)):
        ones = torch.ones(size.D, dtype=compute)
        norm = stacked(
            "norm.weight", lambda e: default_if_none(bank.norm(e), ones).to(compute), 1, size.D, dtype=wide(compute)
        )
    return middle.rms_norm(graph, site, o_ETD, norm, axis=2)


def default_if_none(given: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if given is None else given

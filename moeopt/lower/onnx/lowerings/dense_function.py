"""A row function's graph once per expert, on all tokens: for a few experts, with no shape that depends on data.

    y_TD = sum_e where(chosen, f_e(x) w, 0)

Where, not a product with zero: an expert that overflows on a token that did not choose it must not leak. With weights
on the input each slot has its own rows, so K must be 1. Shape legend: T tokens, K chosen per token, E experts, H
hidden, D output width.

    Costs      E / K times the work; no sort, no Split, no control flow
    Numerics   the sum runs over e in the accumulator's dtype
"""

from __future__ import annotations

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import row_graph, table
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.dense import MOST_EXPERTS
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of
from moeopt.lower.onnx.lowerings.weight_reads import weights_cost
from moeopt.value_types import OnnxValue


class DenseFunction:
    """The lowering ``"dense_function"``: all of at most 16 experts."""

    name = "dense_function"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        if site.bank.num_experts > MOST_EXPERTS:
            return (
                f"dense_function runs every expert on every token; {site.bank.num_experts} are more than {MOST_EXPERTS}"
            )
        if site.spec.weight_on == "input" and site.top_k > 1:
            return (
                "weights on the input differ for each of a token's slots; dense_function carries that for top_k 1 only"
            )
        if site.spec.out_of_range == "identity":
            return "dense_function has no form for ids that mean the identity"
        return row_graph.refuses(site)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        E = site.bank.num_experts
        return weights_cost(site, experts=E, rows=tokens * E, kernels=10 + (len(site.spec.body.nodes) + 5) * E)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        spec, types = site.spec, types_of(site)
        function = row_graph.RowGraph(graph, site)
        chosen_TKE = table.chosen_TKE(graph, site, ids)
        any_TE = table.any_slot_TE(graph, chosen_TKE)
        w_TE = table.weights_TE(graph, site, chosen_TKE, weights)
        if spec.weight_on == "input":
            pair = (cast(graph, x, types.x, types.input_term), cast(graph, weights, types.weights, types.input_term))
            x = cast(graph, graph.op("Mul", list(pair), name="weighted_input"), types.input_term, spec.body.dtype)
        else:
            x = cast(graph, x, types.x, spec.body.dtype)
        zero, terms = scalar(graph, 0.0, types.accum), []
        for e in range(site.bank.num_experts):
            column = graph.const([e], "int64")
            o_TD = function.expert(e, x)
            if spec.weight_on == "output":
                w_T1 = cast(graph, graph.op("Gather", [w_TE, column], axis=1), types.weights, types.term)
                o_TD = graph.op("Mul", [cast(graph, o_TD, types.compute, types.term), w_T1], name="weighted")
            chosen_T1 = graph.op("Gather", [any_TE, column], axis=1)
            o_TD = cast(graph, o_TD, types.term, types.accum)
            terms.append(graph.op("Where", [chosen_T1, o_TD, zero], name="chosen_only"))
        y_TD = terms[0]
        for term in terms[1:]:
            y_TD = graph.op("Add", [y_TD, term], name="sum_over_experts")
        return cast(graph, y_TD, types.accum, types.out)

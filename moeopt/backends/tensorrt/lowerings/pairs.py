"""A token's K slots as N = T K pairs of token and expert: which name an expert, what they read, and their sum.

A slot that names no expert may hold any number, an infinity too, when it comes to the sum: it is replaced there,
not multiplied by zero. Shape legend: T tokens, K chosen per token, N = T K pairs, H hidden, D output width.
"""

from __future__ import annotations

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of
from moeopt.value_types import OnnxValue


def named(graph: Builder, site: ExpertsNode, ids_TK: OnnxValue) -> OnnxValue:
    """True where an id is within 0..E-1."""
    at_least = graph.op("GreaterOrEqual", [ids_TK, graph.const(0, "int64")])
    below = graph.op("Less", [ids_TK, graph.const(site.bank.num_experts, "int64")])
    return graph.op("And", [at_least, below], name="names_an_expert")


def weighted_input(graph: Builder, site: ExpertsNode, x_TH: OnnxValue, weights_TK: OnnxValue) -> OnnxValue:
    """Each token times each of its weights (T, K, H), in the dtype of that product."""
    types = types_of(site)
    x_T1H = graph.op("Unsqueeze", [cast(graph, x_TH, types.x, types.input_term), graph.const([1], "int64")])
    w_TK1 = last(graph, cast(graph, weights_TK, types.weights, types.input_term))
    return graph.op("Mul", [x_T1H, w_TK1], name="weighted_input")


def rows(graph: Builder, site: ExpertsNode, x_TH: OnnxValue, weights_TK: OnnxValue) -> OnnxValue:
    """What each pair's expert reads (T, K, H), in the compute dtype."""
    types = types_of(site)
    if site.spec.weight_on == "input":
        return cast(graph, weighted_input(graph, site, x_TH, weights_TK), types.input_term, types.compute)
    x_T1H = graph.op("Unsqueeze", [cast(graph, x_TH, types.x, types.compute), graph.const([1], "int64")])
    return graph.op("Expand", [x_T1H, graph.const([1, site.top_k, 1], "int64")])


def combine(
    graph: Builder,
    site: ExpertsNode,
    named_TK: OnnxValue,
    ids: OnnxValue,
    o_TKD: OnnxValue,
    x: OnnxValue,
    weights_TK: OnnxValue,
) -> OnnxValue:
    """The pairs' outputs (T, K, D), in the compute dtype, weighed and summed over K in the accumulator's dtype."""
    spec, types = site.spec, types_of(site)
    if spec.weight_on == "output":
        w_TK1 = last(graph, cast(graph, weights_TK, types.weights, types.term))
        o_TKD = graph.op("Mul", [cast(graph, o_TKD, types.compute, types.term), w_TK1], name="weighted")
    o_TKD = cast(graph, o_TKD, types.term, types.accum)
    o_TKD = graph.op("Where", [last(graph, named_TK), o_TKD, scalar(graph, 0.0, types.accum)], name="named_only")
    y_TD = graph.op("ReduceSum", [o_TKD, graph.const([1], "int64")], keepdims=0, name="sum_over_chosen")
    if spec.out_of_range == "identity":
        y_TD = graph.op("Add", [y_TD, identity(graph, site, ids, x, weights_TK)], name="identity")
    return cast(graph, y_TD, types.accum, types.out)


def identity(graph: Builder, site: ExpertsNode, ids: OnnxValue, x: OnnxValue, weights_TK: OnnxValue) -> OnnxValue:
    """What ids beyond the experts add: the token times its weight (T, D), in the accumulator's dtype."""
    types = types_of(site)
    beyond_TK = graph.op("GreaterOrEqual", [ids, graph.const(site.bank.num_experts, "int64")])
    same = cast(graph, weighted_input(graph, site, x, weights_TK), types.input_term, types.accum)
    same = graph.op("Where", [last(graph, beyond_TK), same, scalar(graph, 0.0, types.accum)])
    return graph.op("ReduceSum", [same, graph.const([1], "int64")], keepdims=0)


def last(graph: Builder, value: OnnxValue) -> OnnxValue:
    """``value`` with a last dimension of 1."""
    return graph.op("Unsqueeze", [value, graph.const([-1], "int64")])

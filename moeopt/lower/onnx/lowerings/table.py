"""A token's routing as one row over all experts: which are chosen, and with what weight.

Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.types import scalar, types_of
from moeopt.value_types import OnnxValue


def chosen_TKE(graph: Builder, site: ExpertsNode, ids_TK: OnnxValue) -> OnnxValue:
    """True where slot k of token t names expert e; a slot that names none is false everywhere."""
    experts_E = graph.const(list(range(site.bank.num_experts)), "int64", name="experts")
    ids_TK1 = graph.op("Unsqueeze", [ids_TK, graph.const([-1], "int64")])
    return graph.op("Equal", [ids_TK1, experts_E], name="chosen")


def any_slot_TE(graph: Builder, chosen: OnnxValue) -> OnnxValue:
    """True where some slot of token t names expert e."""
    import onnx_ir as ir

    counted = graph.op("Cast", [chosen], to=int(ir.DataType.FLOAT))  # its integer sums are several times slower
    times_TE = graph.op("ReduceSum", [counted, graph.const([1], "int64")], keepdims=0)
    return graph.op("Greater", [times_TE, graph.const(0, "float32")], name="chosen_by_any_slot")


def weights_TE(graph: Builder, site: ExpertsNode, chosen: OnnxValue, w_TK: OnnxValue) -> OnnxValue:
    """The weight of each expert, 0 where it is not chosen; a slot repeated adds up."""
    zero = scalar(graph, 0.0, types_of(site).weights)
    w_TK1 = graph.op("Unsqueeze", [w_TK, graph.const([-1], "int64")])
    w_TKE = graph.op("Where", [chosen, w_TK1, zero])
    return graph.op("ReduceSum", [w_TKE, graph.const([1], "int64")], keepdims=0, name="weight_of_expert")

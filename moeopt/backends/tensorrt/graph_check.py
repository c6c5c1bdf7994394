"""A whole graph held to the capability table, before a builder sees it: every problem with its node and block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeopt.backends.tensorrt.capability import MOST_OF_TOPK, refuses
from moeopt.backends.tensorrt.target import Target
from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue

BLOCK = "moeopt.block"
"""The node metadata that names the block that a node belongs to."""
_PRODUCTS = ("MatMul", "Gemm", "Einsum")
_BOOLEAN = "Equal Greater GreaterOrEqual Less LessOrEqual And Or Not Xor IsNaN IsInf".split()
_INTEGER = "Shape Size ArgMax ArgMin NonZero".split()
_SECOND = ("Where", "CastLike")
_QUANTISED = {"FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}


def check_graph(model: OnnxModel, target: Target) -> list[str]:
    """What ``target`` would refuse, or read as something else, in an ``onnx_ir.Model``; [] when nothing.

    Subgraphs and functions are checked too. Dtypes that the graph does not state are worked out from those it does.
    """
    kinds = dtypes_in(model)
    own = {(function.domain, function.name) for function in model.functions.values()}
    problems = []
    for node in _nodes(model):
        if (node.domain, node.op_type) in own:
            continue
        problems += [f"{_where(node)}: {why}" for why in _problems(node, target, kinds)]
    return problems


def dtypes_in(model: OnnxModel) -> dict[int, str]:
    """The dtype of each value, by its identity: as stated, else as its node makes it; "" where neither tells."""
    kinds: dict[int, str] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _state(kinds, value, "")
    for node in _nodes(model):
        _work_out(kinds, node)
    return kinds


def _nodes(model: OnnxModel) -> Iterator[Any]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from graph.all_nodes()


def _problems(node: OnnxNode, target: Target, kinds: dict[int, str]) -> list[str]:
    found = [_refused_op(node, target)]
    ins = [kinds.get(id(value), "") for value in node.inputs if value is not None]
    for kind in sorted({*ins, *(kinds.get(id(value), "") for value in node.outputs)}):
        found.append(refuses(target, "dtype", kind))
        if kind in _QUANTISED:
            found.append(refuses(target, "quantisation", _QUANTISED[kind]))
    if node.op_type in _PRODUCTS:
        found += [refuses(target, "product of", kind) for kind in sorted(set(ins))]
    return [why for why in found if why]


def _refused_op(node: OnnxNode, target: Target) -> str:
    if node.domain == "trt" and node.op_type == "TRT_MoE":
        return refuses(target, "op", "TRT_MoE")
    if node.domain not in ("", "ai.onnx"):
        why = refuses(target, "op", node.domain)
        return why or f"the parser ignores the domain of {node.domain}::{node.op_type}, and may take it for another op"
    name = node.op_type
    if name in ("ScatterElements", "ScatterND"):
        reduction = node.attributes.get("reduction")
        return "" if reduction is None or reduction.value == "none" else refuses(target, "op", f"{name}(add)")
    if name == "TopK":
        k = node.inputs[1].const_value
        return refuses(target, "op", "TopK(more)") if k is not None and int(k.numpy().max()) > MOST_OF_TOPK else ""
    return refuses(target, "op", name)


def _where(node: OnnxNode) -> str:
    block = node.metadata_props.get(BLOCK)
    return (f"block {block}, " if block else "") + f"node {node.name or 'without a name'} ({node.op_type})"


def _work_out(kinds: dict[int, str], node: OnnxNode) -> None:
    """The dtypes of what a node gives: as stated, else by its operator, else that of its first input."""
    name, ins = node.op_type, [kinds.get(id(value), "") for value in node.inputs]
    given = [ins[0] if ins else ""] * len(node.outputs)
    if name == "Cast":
        import onnx_ir as ir

        given = [ir.DataType(node.attributes["to"].as_int()).name]
    elif name in _BOOLEAN:
        given = ["BOOL"]
    elif name in _INTEGER:
        given = ["INT64"]
    elif name in _SECOND:
        given = [ins[1]]
    elif name == "TopK":
        given = [ins[0], "INT64"]
    elif name == "Loop":
        given = ins[2:] + [""] * len(node.outputs)
    for value, kind in zip(node.outputs, given, strict=False):
        _state(kinds, value, kind)


def _state(kinds: dict[int, str], value: OnnxValue, otherwise: str) -> None:
    kind = otherwise if value.dtype is None else value.dtype.name
    if kind:
        kinds[id(value)] = kind

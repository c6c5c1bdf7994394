"""What a call of an ONNX graph takes, told from the graph and the call's sizes before a runtime sees either.

ONNX's own shape inference runs on a copy of the graph in which the inputs have the call's sizes and what the graph
says of its inner sizes is forgotten: a file may say anything there. Operators that only one runtime knows stand aside
for ones that give the same size. Where every size comes out, the most that is held at once and the multiplications
are counted; where one does not (a ``Loop``, ``NonZero``, sizes computed from values) there is no such figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SAME_AS_FIRST = frozenset(
    "MoE QMoE RotaryEmbedding SkipLayerNormalization SimplifiedLayerNormalization SkipSimplifiedLayerNormalization"
    " GroupNorm BiasGelu FastGelu Gelu QuickGelu TRT_MoE".split()
)
"""Operators of other domains whose first result is as large as their first input."""
_CONTROL = frozenset(("Loop", "Scan", "If", "SequenceMap"))


@dataclass(frozen=True)
class CallCost:
    """Bytes held at once, and multiplications, of one call."""

    bytes: int
    products: int


def cost_of(proto: Any, shapes: Mapping[str, tuple[int, ...]]) -> CallCost | None:
    """The cost of a call with inputs of ``shapes``; None where it cannot be told from sizes alone."""
    import onnx

    if any(node.op_type in _CONTROL for node in proto.graph.node):
        return None
    try:
        sized = onnx.shape_inference.infer_shapes(_at(proto, shapes), data_prop=True)
    except Exception:  # of several classes: a graph that ONNX does not understand
        return None
    found = {}
    for value in (*sized.graph.value_info, *sized.graph.output, *sized.graph.input):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[value.name] = ([d.dim_value for d in tensor.shape.dim], _width(tensor.elem_type))
    found |= {t.name: (list(t.dims), _width(t.data_type)) for t in sized.graph.initializer}
    return _counted(sized.graph, found)


def _at(proto: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A copy of a graph with inputs of these sizes, nothing said of inner ones, and stand-ins for foreign operators."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in graph.input:
        value.type.tensor_type.ClearField("shape")
        for size in shapes.get(value.name, ()):
            value.type.tensor_type.shape.dim.add(dim_value=size)
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") and node.op_type in _SAME_AS_FIRST:
            del node.attribute[:], node.input[1:], node.output[1:]
            node.op_type, node.domain = "Identity", ""
    return copy


def _counted(graph: Any, found: Mapping[str, tuple[list[int], float]]) -> CallCost | None:
    last = {name: n for n, node in enumerate(graph.node) for name in node.input}
    ends = {value.name for value in graph.output}
    held = most = products = 0
    for n, node in enumerate(graph.node):
        outputs = [name for name in node.output if name]
        if any(name not in found for name in outputs):
            return None
        held += sum(_bytes(found[name]) for name in outputs)
        most = max(most, held)
        products += _products(node, found)
        gone = {name for name in (*node.input, *outputs) if last.get(name, -1) <= n and name not in ends}
        made = {name for earlier in (node.output, node.input) for name in earlier}
        held -= sum(_bytes(found[name]) for name in gone & made if name in found and not _is_graph_input(graph, name))
    return CallCost(most, products)


def _is_graph_input(graph: Any, name: str) -> bool:
    return any(name == t.name for t in graph.initializer) or any(name == v.name for v in graph.input)


def _bytes(value: tuple[list[int], float]) -> int:
    return math.ceil(math.prod(value[0]) * value[1])


def _products(node: Any, found: Mapping[str, tuple[list[int], float]]) -> int:
    """Multiplications of a node, where it has many: each element of a product sums over one side of a factor."""
    inputs = [found[name][0] for name in node.input if name in found]
    result = math.prod(found[node.output[0]][0]) if node.output and node.output[0] in found else 0
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "FusedMatMul") and inputs and inputs[0]:
        return result * max(inputs[0][-2:])
    if node.op_type in ("Conv", "ConvTranspose", "ConvInteger") and len(inputs) > 1:
        return result * math.prod(inputs[1][1:])
    if node.op_type in ("Einsum", "CumSum", "Attention"):
        return result * max((size for shape in inputs for size in shape), default=1)
    return result


def _width(kind: int) -> float:
    import onnx_ir as ir

    try:
        return float(ir.DataType(kind).bitwidth / 8)
    except (ValueError, TypeError):
        return 8.0

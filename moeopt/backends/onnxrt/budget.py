"""What a call of an ONNX graph takes, told from the graph and the call's sizes before a runtime sees either.

ONNX's own shape inference runs on a copy of the graph in which the inputs have the call's sizes and what the graph
says of its inner sizes is forgotten: a file may say anything there. Operators that only one runtime knows stand aside
for ones that give the same size; what moeopt's own operator holds beside its result is added. Where every size comes
out, the most that is held at once and the multiplications are counted; where one does not (a ``Loop``, ``NonZero``,
sizes computed from values) there is no such figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moeopt.lower.onnx.experts_node import DOMAIN, ON_CODES
from moeopt.value_types import OnnxGraph, OnnxModel, OnnxNode, OnnxValue

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


def cost_of(proto: OnnxModel, shapes: Mapping[str, tuple[int, ...]]) -> CallCost | None:
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
    return _counted(sized.graph, found, _experts(proto.graph))


@dataclass(frozen=True)
class _Experts:
    """A node of moeopt's own operator: its expert ids' name, and floats and multiplications for each of them."""

    ids: str
    held: int
    products: int


def _experts(graph: OnnxGraph) -> dict[str, _Experts]:
    """Those of a graph, by the names of their results."""
    sizes = {t.name: list(t.dims) for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.domain == DOMAIN:
            w_in, w_out = _matrices(node, sizes)
            held = sum(w_in) + sum(w_out)  # a row of each input and each product
            found[node.output[0]] = _Experts(node.input[1], held, math.prod(w_in) + math.prod(w_out))
    return found


def _matrices(node: OnnxNode, sizes: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """(inputs, outputs) of one expert's W_in, gate and up together, and W_out."""
    names = list(node.input[3:])
    number = {a.name: a.i for a in node.attribute}
    word = {a.name: a.s for a in node.attribute}
    E = number.get("experts", 1)
    if node.op_type == ON_CODES:
        parts = 2 if word.get("rows") == b"separate" else 1
        first, last = (sizes[names[min(at, len(names) - 1)]] or [0] for at in (0, 2 * parts * E))
        return [number.get("hidden", 0), parts * first[0]], [number.get("inner", 0), last[0]]
    last_name = names[min(1 if number.get("stacked") else E, len(names) - 1)]
    stored = sizes[names[0]][-2:], sizes[last_name][-2:]
    w_in, w_out = (m if word.get(w) == b"io" else m[::-1] for w, m in zip(("w_in", "w_out"), stored, strict=True))
    return w_in, w_out


def _at(proto: OnnxModel, shapes: Mapping[str, tuple[int, ...]]) -> OnnxValue:
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
    sizes = {t.name: list(t.dims) for t in graph.initializer}
    for number, node in enumerate(graph.node):
        if node.domain == DOMAIN:
            w_in, w_out = _matrices(node, sizes)
            x, y = node.input[0], node.output[0]
            stand_in = graph.initializer.add(name=f"moeopt/stand-in/{number}", data_type=onnx.TensorProto.FLOAT)
            stand_in.dims.extend((w_in[0], w_out[-1]))
            node.CopyFrom(onnx.helper.make_node("MatMul", [x, stand_in.name], [y], node.name))
        elif node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            stand_in = graph.initializer.add(name=f"moeopt/stand-in/{number}", data_type=onnx.TensorProto.FLOAT)
            stand_in.dims.extend((attributes.get("K", 0), attributes.get("N", 0)))
            made = onnx.helper.make_node("MatMul", [node.input[0], stand_in.name], list(node.output), node.name)
            node.CopyFrom(made)
        elif node.domain not in ("", "ai.onnx") and node.op_type in _SAME_AS_FIRST:
            del node.attribute[:], node.input[1:], node.output[1:]
            node.op_type, node.domain = "Identity", ""
    return copy


def _counted(
    graph: OnnxGraph, found: Mapping[str, tuple[list[int], float]], experts: Mapping[str, _Experts]
) -> CallCost | None:
    last = {name: n for n, node in enumerate(graph.node) for name in node.input}
    ends = {value.name for value in graph.output}
    held = most = products = 0
    for n, node in enumerate(graph.node):
        outputs = [name for name in node.output if name]
        if any(name not in found for name in outputs):
            return None
        held += sum(_bytes(found[name]) for name in outputs)
        inside = experts.get(outputs[0]) if outputs else None
        rows = 0
        if inside is not None:
            if inside.ids not in found:
                return None
            rows = math.prod(found[inside.ids][0])
            products += rows * inside.products
        most = max(most, held + (4 * rows * inside.held if inside is not None else 0))
        products += _products(node, found)
        gone = {name for name in (*node.input, *outputs) if last.get(name, -1) <= n and name not in ends}
        made = {name for earlier in (node.output, node.input) for name in earlier}
        held -= sum(_bytes(found[name]) for name in gone & made if name in found and not _is_graph_input(graph, name))
    return CallCost(most, products)


def _is_graph_input(graph: OnnxGraph, name: str) -> bool:
    return any(name == t.name for t in graph.initializer) or any(name == v.name for v in graph.input)


def _bytes(value: tuple[list[int], float]) -> int:
    return math.ceil(math.prod(value[0]) * value[1])


def _products(node: OnnxNode, found: Mapping[str, tuple[list[int], float]]) -> int:
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

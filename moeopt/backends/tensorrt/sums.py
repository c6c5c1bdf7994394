"""Float32 matmuls as sums of products, for Turing, where TensorRT for RTX has no others.

    MatMul(a, b)  ->  ReduceSum(Unsqueeze(a, -1) * Unsqueeze(b, -3), -2)        a (..., M, K), b (..., K, N)

TensorRT fuses the three nodes into one kernel that keeps no (M, K, N) tensor: the planned activation memory of
(T, 512) by (512, 1024) is 0 bytes (1.7.1.116, sm_75). Turing has no tensor cores for float32 in any case. ONNX
Runtime would keep that tensor, so what it replays has the products themselves.
"""

from __future__ import annotations

from typing import Any

from moeopt.backends.tensorrt.graph_check import dtypes_in
from moeopt.backends.tensorrt.target import Target
from moeopt.value_types import OnnxAttribute, OnnxModel, OnnxNode, OnnxValue

FIRST_WITH_PRODUCTS = 80


def sums_for(target: Target) -> bool:
    """Whether float32 products of this target are written as sums."""
    return target.sm < FIRST_WITH_PRODUCTS


def matmuls_as_sums(model: OnnxModel) -> int:
    """Rewrite the float32 ``MatMul`` and ``Gemm`` nodes of an ``onnx_ir.Model`` in place; how many there were.

    A product with a vector stays, and so does ``Einsum``: :func:`~.graph_check.check_graph` names what is left.
    """
    kinds, count = dtypes_in(model), 0
    for node in list(model.graph.all_nodes()):
        if node.domain or node.op_type not in ("MatMul", "Gemm") or kinds.get(id(node.inputs[0])) != "FLOAT":
            continue
        if any(value.shape is not None and len(value.shape) < 2 for value in node.inputs[:2]):
            continue
        made = _Nodes(node)
        a, b = node.inputs[:2]
        factor = {"alpha": 1.0, "beta": 1.0}
        if node.op_type == "Gemm":
            a = made.op("Transpose", [a], perm=[1, 0]) if _attribute(node, "transA") else a
            b = made.op("Transpose", [b], perm=[1, 0]) if _attribute(node, "transB") else b
            factor = {name: _attribute(node, name, 1.0) for name in factor}
        wide = made.op("Mul", [made.op("Unsqueeze", [a, made.ints(-1)]), made.op("Unsqueeze", [b, made.ints(-3)])])
        y = made.op("ReduceSum", [wide, made.ints(-2)], keepdims=0)
        y = y if factor["alpha"] == 1.0 else made.op("Mul", [y, made.number(factor["alpha"])])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            term = node.inputs[2]
            term = term if factor["beta"] == 1.0 else made.op("Mul", [term, made.number(factor["beta"])])
            y = made.op("Add", [y, term])
        made.replace(y)
        count += 1
    return count


class _Nodes:
    """What takes the place of one node; named after it, so that a log still names its block."""

    def __init__(self, node: OnnxNode) -> None:
        self.node = node
        self.nodes: list[Any] = []

    def op(self, kind: str, inputs: list[Any], **attributes: OnnxAttribute) -> OnnxValue:
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes, name=f"{self.node.name}/{kind}_{len(self.nodes)}")
        made.metadata_props.update(self.node.metadata_props)
        made.outputs[0].name = made.name
        if kind != "Constant":
            made.outputs[0].dtype = self.node.inputs[0].dtype or ir.DataType.FLOAT
        self.nodes.append(made)
        return made.outputs[0]

    def ints(self, value: int) -> OnnxValue:
        import numpy as np
        import onnx_ir as ir

        return self.op("Constant", [], value=ir.tensor(np.array([value], dtype=np.int64)))

    def number(self, value: float) -> OnnxValue:
        import numpy as np
        import onnx_ir as ir

        return self.op("Constant", [], value=ir.tensor(np.array(value, dtype=np.float32)))

    def replace(self, y: OnnxValue) -> None:
        import onnx_ir as ir

        old = self.node.outputs[0]
        y.type, y.shape, name = old.type, old.shape, old.name
        self.node.graph.insert_before(self.node, self.nodes)
        ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
        self.node.graph.remove(self.node, safe=True)
        y.name = name


def _attribute(node: OnnxNode, name: str, otherwise: OnnxValue = 0) -> OnnxValue:
    return node.attributes[name].value if name in node.attributes else otherwise

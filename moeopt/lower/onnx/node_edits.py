"""Reading and replacing single nodes of an ``onnx_ir`` graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeopt.value_types import OnnxNode, OnnxValue, PyObject


def is_op(node: OnnxNode, op: str, domain: str = "") -> bool:
    """Whether ``node`` is one of ``op``; "" is ONNX's own domain."""
    return bool(node.op_type == op and node.domain == domain)


def numbers_of(value: OnnxValue) -> list[int] | None:
    """The integers of a constant of one dimension."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) != 1 or tensor.size > 16:
        return None
    return [int(n) for n in tensor.numpy()]


def same_size(one: PyObject, two: PyObject) -> bool:
    """Whether two sizes are one number, or of one name."""
    if isinstance(one, int) or isinstance(two, int):
        return bool(one == two)
    return one.value is not None and one.value == two.value


def alike(one: OnnxValue, two: OnnxValue) -> bool:
    """Whether two values have the same known shape."""
    if one.shape is None or two.shape is None or len(one.shape) != len(two.shape):
        return False
    return all(map(same_size, one.shape, two.shape))


def sizes_constant(near: OnnxNode, numbers: list[int]) -> OnnxValue:
    """A constant of these integers in the graph of ``near``, one for equal ones."""
    import onnx_ir as ir

    graph = near.graph
    name = "sizes_" + "_".join(map(str, numbers)).replace("-", "m")
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        graph.register_initializer(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape,
                                            const_value=tensor))  # fmt: skip
    return graph.initializers[name]


def add_before(before: OnnxNode, op: str, inputs: list[Any], attributes: dict[str, Any], like: OnnxValue,
         domain: str = "") -> OnnxValue:  # fmt: skip
    """A node in front of ``before``, whose result has the type and shape of ``like``."""
    import onnx_ir as ir

    node = ir.node(op, inputs, attributes, domain=domain)
    value = node.outputs[0]
    value.type, value.shape = like.type, like.shape
    before.graph.insert_before(before, node)
    return value


def put(node: OnnxNode, op: str, inputs: list[Any], attributes: dict[str, Any], domain: str = "") -> None:
    """A node in the place of ``node``; its result has the old one's name."""
    import onnx_ir as ir

    old = node.outputs[0]
    new, name, graph = add_before(node, op, inputs, attributes, old, domain), old.name, node.graph
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.producer().metadata_props.update(node.metadata_props)
    graph.remove(node, safe=True)
    old.name, new.name = f"{name}~", name


def drop(node: OnnxNode) -> None:
    """Let the first input of ``node`` stand for its result."""
    import onnx_ir as ir

    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
    node.graph.remove(node, safe=True)

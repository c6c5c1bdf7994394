"""What shape a weight has where it is multiplied, without a look at its numbers.

    W (in, out) -> MatMul        Reshape(flat) -> MatMul        Gemm(x, W_t, transB=1)        all (in, out)

Optimisers of graphs fold the views of one weight and leave those of another, so that experts of one block may lie in
different shapes. Nodes between a constant and its product run on tensors without data.
"""

from __future__ import annotations

import math

import torch

from moeopt.errors import Declined
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.table import OPERATORS, operator_of
from moeopt.onnx_in.tensors import attribute_value, constant_of, tensor_of
from moeopt.onnx_in.values import GraphValue, SizeValue, tensor
from moeopt.value_types import OnnxNode, OnnxValue

_DEEPEST = 12
"""Nodes between a constant and its product."""
_FEW = 64
"""Numbers of a constant that may be a shape or a place."""
_STOPS = (Declined, RuntimeError, ValueError, IndexError, TypeError, KeyError, StopIteration)


def shape_made(value: OnnxValue) -> tuple[int, ...]:
    """The shape of a value that nodes make of constants; () where that is not to be seen."""
    try:
        return tuple(int(n) for n in tensor(_made(value, {}, 0)).shape)
    except _STOPS:
        return ()


def whole_numbers_made(value: OnnxValue) -> tuple[int, ...] | None:
    """The few whole numbers that a constant is, or that nodes make of constants; None of any other value."""
    held = value.const_value
    if held is not None:
        few = held.dtype.is_integer() and math.prod(held.shape) <= _FEW
        return tuple(held.numpy().reshape(-1).tolist()) if few else None
    try:
        made = _made(value, {}, 0)
    except _STOPS:
        return None
    if isinstance(made, torch.Tensor):  # taken out of whole numbers; weights, and what is made of them, have no data
        few = not made.is_meta and not made.is_floating_point() and made.numel() <= _FEW
        return tuple(int(n) for n in made.reshape(-1)) if few else None
    return tuple(int(n) for n in made.array.reshape(-1)) if isinstance(made, SizeValue) else None


def matrix_shape(node: OnnxNode, number: int) -> tuple[int, ...]:
    """The shape of the weight that is a product's input ``number``, inputs before outputs; () if not to be seen."""
    shape = shape_made(node.inputs[number])
    flag = node.attributes.get("transB" if number else "transA")
    turned = flag is not None and bool(flag.as_int())
    return (*shape[:-2], *reversed(shape[-2:])) if turned == bool(number) else shape


def _made(value: OnnxValue, found: dict[int, GraphValue], depth: int) -> GraphValue:
    if id(value) not in found:
        found[id(value)] = _run(value, found, depth)
    return found[id(value)]


def _run(value: OnnxValue, found: dict[int, GraphValue], depth: int) -> GraphValue:
    node = value.producer()
    if value.const_value is not None:
        held = value.const_value
        shape = [int(n) for n in held.shape]
        if math.prod(shape) <= _FEW and held.dtype.is_integer():
            return _number(tensor_of(held, value.name or ""))
        return torch.empty(shape, device="meta")
    if node is None or depth > _DEEPEST:
        raise Declined("no constant")
    if node.op_type == "Constant":
        made = constant_of(node)
        return _number(made) if made.numel() <= _FEW and not made.is_floating_point() else made.to("meta")
    inputs = [None if v is None else _made(v, found, depth + 1) for v in node.inputs]
    if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
        return tensor(inputs[0])
    attributes = {name: attribute_value(a, node.name) for name, a in node.attributes.items()}
    call = NodeCall(node.name or "", inputs, attributes, len(node.outputs))
    results = OPERATORS[operator_of(node)](call)
    several = results if isinstance(results, tuple) else (results,)
    found.update({id(v): r for v, r in zip(node.outputs, several, strict=False)})
    return found[id(value)]


def _number(found: torch.Tensor) -> SizeValue:
    return SizeValue(found.tolist(), found.dtype, found)

"""Constants of a file as tensors: initializers, what ``Constant`` nodes hold, and what nodes compute of these alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.table import OPERATORS
from moeopt.onnx_in.tensors import attribute_value, constant_of, tensor_of
from moeopt.onnx_in.values import tensor
from moeopt.value_types import OnnxNode, OnnxValue

DEEPEST = 12
"""Nodes between a constant and the initializers that it is made of."""
_LARGEST = {"INT8": (-128, 127), "UINT8": (0, 255), "INT4": (-8, 7), "UINT4": (0, 15)}


class ConstantReader:
    """Reads constants, anew at each call.

    Args:
        opset: the version of ONNX's own operators.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset

    def is_constant(self, value: OnnxValue, depth: int = DEEPEST) -> bool:
        """Whether a value can be read here."""
        if value.const_value is not None:
            return not value.is_graph_input()
        node = value.producer()
        if node is None or depth == 0:
            return False
        reads = [v for v in node.inputs if v is not None]
        known = node.op_type in ("Constant", "QuantizeLinear") or ("", node.op_type) in OPERATORS
        return known and all(self.is_constant(v, depth - 1) for v in reads)

    def kind(self, value: OnnxValue) -> str:
        """The element type of a constant, in lower case: also ``int4`` and ``uint4``, which torch has not."""
        import onnx_ir as ir

        node = value.producer()
        while value.const_value is None and node is not None and node.op_type not in ("Constant", "QuantizeLinear"):
            value = node.inputs[0]
            node = value.producer()
        if value.const_value is not None:
            return str(value.const_value.dtype.name).lower()
        assert node is not None, "a constant is an initializer or made by a node"
        if node.op_type == "QuantizeLinear":
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            asked = node.attributes.get("output_dtype")
            if zero is None and asked is not None and asked.as_int():
                return str(ir.DataType(asked.as_int()).name).lower()
            return "uint8" if zero is None else self.kind(zero)
        held = node.attributes.get("value")
        return "int64" if held is None else str(held.value.dtype.name).lower()

    def shape(self, value: OnnxValue) -> tuple[int, ...]:
        """The shape of a constant."""
        if value.const_value is not None:
            return tuple(int(n) for n in value.const_value.shape)
        return tuple(self.read(value).shape)

    def read(self, value: OnnxValue) -> Tensor:
        """A constant as a tensor; codes of 4 bits are int8 or uint8, one a byte.

        Raises:
            Declined: torch has no such element type; the message names it.
        """
        if value.const_value is not None:
            return tensor_of(value.const_value, value.name)
        node = value.producer()
        if node.op_type == "Constant":
            return constant_of(node)
        inputs = [None if v is None else self.read(v) for v in node.inputs]
        if node.op_type == "QuantizeLinear":
            return self._quantised(node, inputs)
        attributes = {name: attribute_value(a, node.name) for name, a in node.attributes.items()}
        call = NodeCall(f"the node {node.name!r} ({node.op_type})", inputs, attributes, len(node.outputs), self._opset)
        made = OPERATORS["", node.op_type](call)
        several = made if isinstance(made, tuple) else (made,)
        return tensor(several[list(node.outputs).index(value)])

    def _quantised(self, node: OnnxNode, inputs: Sequence[Any]) -> Tensor:
        """The codes of constant floats, rounded half to even."""
        x, scale = inputs[:2]
        kind = self.kind(node.outputs[0]).upper()
        axis = node.attributes.get("axis")
        size = node.attributes.get("block_size")
        if kind not in _LARGEST or (size is not None and size.as_int()):
            raise Declined(
                f"the node {node.name!r} (QuantizeLinear) makes {kind} in blocks or of a type that is not read"
            )
        shape = [1] * x.dim()
        if scale.numel() > 1:
            shape[axis.as_int() if axis is not None else 1] = -1
        codes = (x / scale.reshape(shape)).round()
        if len(inputs) > 2 and inputs[2] is not None:
            codes = codes + inputs[2].reshape(shape)
        made: Tensor = codes.clamp(*_LARGEST[kind]).to(torch.uint8 if kind.startswith("U") else torch.int8)
        return made

"""Constants of a file as tensors: initializers, what ``Constant`` nodes hold, and what nodes compute of these alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.table import CONTRIB, OPERATORS, operator_of
from moeopt.onnx_in.products import MOVING
from moeopt.onnx_in.tensors import attribute_value, constant_of, tensor_of
from moeopt.onnx_in.values import tensor
from moeopt.value_types import OnnxNode, OnnxValue

QUANTISE = "QuantizeLinear"
MOST_NODES = 256
"""Of a constant: what more nodes compute is not read as one."""
_LARGEST = {"INT8": (-128, 127), "UINT8": (0, 255), "INT4": (-8, 7), "UINT4": (0, 15)}
_PRECISIONS = {0: None, 1: torch.float32, 10: torch.float16}
"""What a ``QuantizeLinear`` divides in, by its attribute ``precision`` (opset 23); None: in the type of its floats."""


class ConstantReader:
    """Reads constants, anew at each call; a call looks once at each node that a constant is made of.

    Args:
        opset: the version of ONNX's own operators.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset

    def is_constant(self, value: OnnxValue) -> bool:
        """Whether a value can be read here."""
        todo, seen = [value], {id(value)}
        while todo:
            one = todo.pop()
            if one.const_value is not None:
                if one.is_graph_input():
                    return False
                continue
            node = one.producer()
            if node is None or not _is_run(node) or len(seen) > MOST_NODES:
                return False
            fresh = {id(v): v for v in node.inputs if v is not None and id(v) not in seen}
            seen |= fresh.keys()
            todo += fresh.values()
        return True

    def kind(self, value: OnnxValue) -> str:
        """The element type of a constant, in lower case: also ``int4`` and ``uint4``, which torch has not."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import from_torch_dtype

        node = value.producer()
        while value.const_value is None and node is not None and node.op_type in MOVING - {QUANTISE, "Cast"}:
            value = given(node, 0)
            node = value.producer()
        if value.const_value is not None:
            return str(value.const_value.dtype.name).lower()
        assert node is not None, "a constant is an initializer or made by a node"
        if node.op_type == QUANTISE:
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            asked = node.attributes.get("output_dtype")
            if zero is None and asked is not None and asked.as_int():
                return str(ir.DataType(asked.as_int()).name).lower()
            return "uint8" if zero is None else self.kind(zero)
        held = node.attributes.get("value")
        if node.op_type == "Constant" and held is not None:
            return str(held.value.dtype.name).lower()
        return str(from_torch_dtype(self.read(value).dtype).name).lower()

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
        made: dict[int, Tensor] = {}
        todo = [value]
        while todo:
            one = todo[-1]
            node = None if one.const_value is not None else one.producer()
            waits = [v for v in node.inputs if v is not None and id(v) not in made] if node is not None else []
            if waits:
                todo += {id(v): v for v in waits}.values()
                continue
            if id(one) not in made:
                made[id(one)] = self._made(one, node, made)
            todo.pop()
        return made[id(value)]

    def _made(self, value: OnnxValue, node: OnnxNode, made: Mapping[int, Tensor]) -> Tensor:
        """An initializer, or what its node makes of constants that were read."""
        if node is None:
            return tensor_of(value.const_value, value.name)
        if node.op_type == "Constant":
            return constant_of(node)
        inputs = [None if v is None else made[id(v)] for v in node.inputs]
        if node.op_type == QUANTISE:
            return self._quantised(node, inputs)
        attributes = {name: attribute_value(a, node.name) for name, a in node.attributes.items()}
        call = NodeCall(f"the node {node.name!r} ({node.op_type})", inputs, attributes, len(node.outputs), self._opset)
        found = OPERATORS[operator_of(node)](call)
        several = found if isinstance(found, tuple) else (found,)
        return tensor(several[list(node.outputs).index(value)])

    def _quantised(self, node: OnnxNode, inputs: Sequence[Any]) -> Tensor:
        """The codes of constant floats, rounded half to even, as ONNX Runtime has them.

        It divides in float32, and from opset 23 on, which lets the node say in what, in the type of the floats. What is
        no number becomes the lowest code.
        """
        x, scale = inputs[:2]
        kind = self.kind(node.outputs[0]).upper()
        at = {name: a.value for name, a in node.attributes.items()}
        if kind not in _LARGEST or at.get("block_size", 0) or at.get("precision", 0) not in _PRECISIONS:
            raise Declined(
                f"the node {node.name!r} (QuantizeLinear) makes {kind} in blocks, of a type or in a precision that is "
                "not read"
            )
        shape = [1] * x.dim()
        if scale.numel() > 1:
            shape[at.get("axis", 1)] = -1
        says = self._opset >= 23 and node.domain != CONTRIB
        dtype = (_PRECISIONS[at.get("precision", 0)] or x.dtype) if says else torch.float32
        codes = (x.to(dtype) / scale.to(dtype).reshape(shape)).round()
        if len(inputs) > 2 and inputs[2] is not None:
            codes = codes + inputs[2].reshape(shape)
        low, high = _LARGEST[kind]
        codes = codes.clamp(low, high).nan_to_num(low)
        made: Tensor = codes.to(torch.uint8 if kind.startswith("U") else torch.int8)
        return made


def _is_run(node: OnnxNode) -> bool:
    domain, op_type = operator_of(node)
    return (domain, op_type) in OPERATORS or op_type in ("Constant", QUANTISE) and domain in ("", CONTRIB)


def given(node: OnnxNode, number: int) -> OnnxValue:
    """An input that a node must have. ``Declined`` where it is left out."""
    value = node.inputs[number] if number < len(node.inputs) else None
    if value is None:
        raise Declined(
            f"the node {node.name!r} ({node.op_type}) lacks its input number {number}: the file was damaged or edited"
        )
    return value

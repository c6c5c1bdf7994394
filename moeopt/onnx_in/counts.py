"""Whole numbers from 0 on in a graph: which values are, what they count, and constants that are looked through."""

from __future__ import annotations

import math

from torch import Tensor

from moeopt.onnx_in.operators.table import operator_of
from moeopt.onnx_in.products import shape_of
from moeopt.onnx_in.tensors import constant_of, tensor_of
from moeopt.value_types import OnnxNode, OnnxValue

_MOST_NUMBERS = 4096
"""Of a constant that is looked through."""
FAR = 48
"""Nodes that a question may go back."""
SAME_NUMBERS = frozenset(("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Cast", "Dropout"))
"""Operators that keep every number of their first input, in other places or another type."""
_OF_SHAPE = SAME_NUMBERS | {"Gather", "Slice", "Split", "ReduceProd", "ReduceMin"}
"""Operators behind ``Shape`` whose zero says that one of the sizes is."""
FLAGS = frozenset(
    ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf")
)
"""Operators that give flags."""
_COUNTS_KEPT = SAME_NUMBERS | set("Gather GatherND Slice Split ReduceSum ReduceMax ReduceProd Mul Add".split())
"""Operators that give whole numbers from 0 on where they are given such."""


def maker(value: OnnxValue) -> OnnxNode | None:
    """The node of a known domain that makes a value; None where none does."""
    node = None if value is None else value.producer()
    return node if node is None or operator_of(node)[0] in ("", "com.microsoft") else None


def is_held(value: OnnxValue) -> bool:
    """Whether a value is a constant that no caller can replace."""
    node = value.producer()
    return value.const_value is not None and not value.is_graph_input() if node is None else node.op_type == "Constant"


def numbers(value: OnnxValue) -> Tensor | None:
    """A small constant; None of any other value."""
    if not is_held(value):
        return None
    node = value.producer()
    shape = shape_of(value)
    if shape is None or math.prod(shape) > _MOST_NUMBERS:
        return None
    return constant_of(node) if node is not None else tensor_of(value.const_value, str(value.name))


def all_zero(value: OnnxValue) -> bool:
    held = numbers(value)
    return held is not None and not held.any()


def number(value: OnnxValue) -> float | None:
    """A constant that is one number."""
    held = numbers(value)
    return float(held.item()) if held is not None and held.numel() == 1 else None


def is_flag(value: OnnxValue) -> bool:
    node = maker(value)
    return node is not None and (node.op_type in FLAGS or (node.op_type in SAME_NUMBERS and is_flag(node.inputs[0])))


def is_count(value: OnnxValue, depth: int = 0) -> bool:
    """Whether a value is whole numbers from 0 on, or flags, by what makes it."""
    if depth > FAR:
        return False
    if is_held(value):
        held = numbers(value)
        return held is not None and not held.is_floating_point() and bool((held >= 0).all())
    node = maker(value)
    if node is None:
        return False
    if node.op_type in FLAGS or node.op_type in ("Shape", "Size", "NonZero"):
        return True
    if node.op_type == "OneHot":
        values = numbers(node.inputs[2])
        return values is not None and bool((values >= 0).all()) and bool((values == values.round()).all())
    kept = node.op_type in _COUNTS_KEPT
    return kept and all(is_count(v, depth + 1) for v in node.inputs[: 2 if node.op_type in ("Mul", "Add") else 1])


def measured(value: OnnxValue) -> OnnxValue | None:
    """The value of which this is the number of elements, or sizes."""
    for _ in range(FAR):
        node = maker(value)
        if node is None or node.op_type in ("Shape", "Size"):
            return None if node is None else node.inputs[0]
        if node.op_type not in _OF_SHAPE:
            return None
        value = node.inputs[0]
    return None


def is_whole_slice(node: OnnxNode) -> bool:
    """Whether a ``Slice`` cuts nothing off."""
    if node.op_type != "Slice":
        return False
    starts, ends = (numbers(v) for v in node.inputs[1:3])
    steps = numbers(node.inputs[4]) if len(node.inputs) > 4 else None
    whole = starts is not None and ends is not None and not starts.any() and bool((ends >= (1 << 31) - 1).all())
    return whole and (len(node.inputs) < 5 or (steps is not None and bool((steps == 1).all())))

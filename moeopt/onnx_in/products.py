"""Matrix products with constant weights, reached through whatever moves data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import shape_made
from moeopt.onnx_in.operators.table import operator_of
from moeopt.onnx_in.weight_parts import part_of_constant
from moeopt.value_types import OnnxNode, OnnxValue

PRODUCTS = {
    ("", "MatMul"): (0, 1), ("", "Gemm"): (0, 1), ("", "Conv"): (0, 1), ("", "Einsum"): (0, 1),
    ("", "MatMulInteger"): (0, 1), ("", "QLinearMatMul"): (0, 3), ("", "ConvInteger"): (0, 1),
    ("", "QLinearConv"): (0, 3),
    ("com.microsoft", "MatMulNBits"): (0, 1), ("com.microsoft", "FusedMatMul"): (0, 1),
    ("com.microsoft", "MatMulIntegerToFloat"): (0, 1), ("com.microsoft", "DynamicQuantizeMatMul"): (0, 1),
    ("com.microsoft", "QGemm"): (0, 3), ("com.microsoft", "FusedGemm"): (0, 1), ("com.microsoft", "FusedConv"): (0, 1),
}  # fmt: skip
"""Which inputs of an operator are multiplied."""
CONVOLUTIONS = frozenset(("Conv", "ConvInteger", "QLinearConv", "FusedConv"))
WHOLE = {("com.microsoft", "MoE"), ("com.microsoft", "QMoE")}
"""Operators that are all experts of a block at once."""
MOVING = frozenset(
    (
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Tile",
        "Transpose",
        "Gather",
        "GatherND",
        "GatherElements",
    )
    + ("Slice", "Split", "Cast", "Identity", "Concat", "Compress", "DequantizeLinear", "QuantizeLinear", "ScatterND")
    + ("ScatterElements", "Pad", "Dropout", "DynamicQuantizeLinear")
)
"""Operators whose result has the values of their first input in other places, or rounded."""
_MOST_VIEWS = 12
"""Of a weight between its initializer and its product."""


@dataclass(frozen=True)
class WeightProduct:
    """A product with constant weights: its node's position, the rows it reads, the constant and its shape.

    ``scales``: of codes, the constant that they are multiplied with; None of floats. ``part``: where in the constant
    the matrix lies; () where it is all of it, or several matrices. ``of_all``: of experts that are this product alone,
    how many matrices it multiplies by, or picks from.
    """

    at: int
    node: OnnxNode
    rows: OnnxValue
    weight: OnnxValue
    shape: tuple[int, ...]
    picked: bool
    scales: OnnxValue = None
    part: tuple[Hashable, ...] = ()
    of_all: int = 0

    @property
    def function(self) -> Hashable:
        """What tells a matrix from others: two of the same codes are two matrices where their scales are two, and so
        are two parts of one constant."""
        return id(self.weight), id(self.scales), self.part

    @property
    def stacked(self) -> int:
        """How many matrices the weight holds, 1 for a plain one and for one that is taken out of a stack."""
        return self.of_all or (self.shape[0] if self.of_stack and not self.part else 1)

    @property
    def of_stack(self) -> bool:
        """Whether the constant holds several matrices along its first axis."""
        return _is_stack(self.node, self.shape)


def weight_products(index: GraphIndex) -> dict[int, WeightProduct]:
    """Every product with constant weights, by its position; a graph is looked through once."""
    if index.products is not None:
        return index.products
    index.visited += len(index.nodes)
    found: dict[int, WeightProduct] = {}
    for at, node in enumerate(index.nodes):
        sides = PRODUCTS.get(operator_of(node))
        if sides is None or max(sides) >= len(node.inputs):
            continue
        for rows, weight in (sides, sides[::-1]):
            constant, picked = constant_behind(index, node.inputs[weight])
            value = node.inputs[rows]
            if constant is not None and value is not None and not index.is_constant(value):
                shape = shape_of(constant)
                if shape is not None and len(shape) == 1:
                    shape = shape_made(node.inputs[weight])
                if shape is not None and len(shape) >= 2:
                    scales = scales_of(node, node.inputs[weight])
                    part = part_of_constant(index, node.inputs[weight], _is_stack(node, shape))
                    found[at] = WeightProduct(at, node, value, constant, shape, picked, scales, part)
                break
    index.products = found
    return found


def constant_behind(index: GraphIndex, value: OnnxValue) -> tuple[Any, bool]:
    """The initializer that a weight comes of by moving data, and whether data choose a part of it; (None, False)."""
    picked = False
    for _ in range(_MOST_VIEWS):
        if value is None:
            return None, False
        node = value.producer()
        if index.is_constant(value) and (node is None or node.op_type == "Constant"):
            return (value, picked) if shape_of(value) is not None else (None, False)
        if node is None:
            return None, False
        if node.op_type not in MOVING:
            return None, False
        picked |= not index.is_constant(value)
        value = node.inputs[0]
    return None, False


def _is_stack(node: OnnxNode, shape: Sequence[int]) -> bool:
    """Whether a weight of that shape holds several matrices of a product."""
    return len(shape) >= 3 and node.op_type not in CONVOLUTIONS and node.op_type != "MatMulNBits"


def scales_of(node: OnnxNode, weight: OnnxValue) -> OnnxValue | None:
    """What the codes of a product's weight are multiplied with; None of floats."""
    if node.op_type == "MatMulNBits":
        return node.inputs[2] if len(node.inputs) > 2 else None
    for _ in range(_MOST_VIEWS):
        made = None if weight is None else weight.producer()
        if made is None or made.op_type not in MOVING:
            return None
        if made.op_type == "DequantizeLinear":
            return made.inputs[1] if len(made.inputs) > 1 else None
        weight = made.inputs[0]
    return None


def shape_of(value: OnnxValue) -> tuple[int, ...] | None:
    """The shape of an initializer or of what a ``Constant`` node holds; None of any other value."""
    if value.const_value is not None:
        return tuple(int(n) for n in value.const_value.shape)
    node = value.producer()
    held = node.attributes.get("value") if node is not None and node.op_type == "Constant" else None
    return None if held is None else tuple(int(n) for n in held.value.shape)

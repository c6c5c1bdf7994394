"""Which part of a constant a weight is: several matrices may lie in one constant, and nodes take them out.

    Split(W (4 * in, out))[e] -> MatMul        Slice(W, e * in, ...) -> MatMul        Gather(stack, e) -> MatMul

Two nodes that cut the same part give one matrix, and two that cut other parts give two.
"""

from __future__ import annotations

from collections.abc import Hashable

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import whole_numbers_made
from moeopt.value_types import OnnxNode, OnnxValue

_CUTS = frozenset(("Slice", "Split", "Gather", "GatherND", "GatherElements", "Compress", "Concat"))
"""Operators whose result is a part of their first input, or more."""
_MOST_VIEWS = 12
"""Of a weight between its initializer and its product."""


def part_of_constant(index: GraphIndex, weight: OnnxValue, of_stack: bool) -> tuple[Hashable, ...]:
    """What tells the part that a weight is of its constant from other parts; () where it is all of it.

    Args:
        of_stack: the constant is matrices along its first axis. They are counted by its shape, and only what takes one
            of them out is a part.
    """
    found: list[Hashable] = []
    for _ in range(_MOST_VIEWS):
        node = None if weight is None else weight.producer()
        if node is None or not node.inputs:
            break
        if node.op_type in _CUTS and index.is_constant(weight):
            axis = node.attributes.get("axis")
            along = 0 if axis is None else axis.as_int()
            places = [_place(v) for v in node.inputs[1:]]
            if not of_stack or _takes_one(node, along, places):
                found.append((node.op_type, list(node.outputs).index(weight), along, *places))
        weight = node.inputs[0]
    return tuple(found)


def _takes_one(node: OnnxNode, along: int, places: list[Hashable]) -> bool:
    """Whether a node takes one matrix out of a stack."""
    return node.op_type == "Gather" and along == 0 and isinstance(places[0], tuple) and len(places[0]) == 1


def _place(value: OnnxValue) -> Hashable:
    """Where a part lies, as numbers; another constant by its identity."""
    return None if value is None else whole_numbers_made(value) or id(value)

"""Experts that take a constant number of rows each: a capacity, which an export may have frozen from its sample.

    TopK(scores) -> ids        Where(ids == e, weights, 0) -> TopK(k = 10) -> Gather(x, rows) -> expert e

A file does not tell a capacity that is the model's own from one that the model computed of the sample.
"""

from __future__ import annotations

from collections.abc import Iterable

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import whole_numbers_made
from moeopt.onnx_in.products import MOVING, WeightProduct
from moeopt.value_types import OnnxNode, OnnxValue

_FAR = 32
"""Nodes between an expert's rows, what picks them, and the choice of experts before."""


def capacity_of(index: GraphIndex, products: Iterable[WeightProduct]) -> tuple[OnnxNode, int] | None:
    """The node that picks an expert's rows among those that chose this expert, and how many it picks."""
    for product in products:
        pick = _picks_rows(index, product.rows)
        numbers = None if pick is None else whole_numbers_made(pick.inputs[1])
        if pick is not None and numbers is not None and len(numbers) == 1 and _is_made_of_choice(index, pick):
            return pick, numbers[0]
    return None


def takes_any_number(index: GraphIndex) -> bool:
    """Whether an input of the graph has a size that is free."""
    return any(not isinstance(d, int) for v in index.graph.inputs if v.shape is not None for d in v.shape)


def _picks_rows(index: GraphIndex, rows: OnnxValue) -> OnnxNode | None:
    """The ``TopK`` whose places rows are gathered at."""
    value, gathered = rows, False
    for _ in range(_FAR):
        node = None if value is None or index.is_constant(value) else value.producer()
        if node is None:
            return None
        if gathered and node.op_type == "TopK":
            return node if value is node.outputs[1] else None
        if node.op_type not in MOVING:
            return None
        place = node.op_type.startswith("Gather") and not gathered and not index.is_constant(node.inputs[1])
        gathered |= place
        value = node.inputs[1 if place else 0]
    return None


def _is_made_of_choice(index: GraphIndex, pick: OnnxNode) -> bool:
    """Whether what a node picks among is made of what another one chose."""
    todo, seen = [pick.inputs[0]], set[int]()
    while todo and len(seen) < _FAR:
        value = todo.pop(0)
        node = None if value is None or index.is_constant(value) else value.producer()
        if node is None or id(node) in seen:
            continue
        if node.op_type in ("TopK", "ArgMax"):
            return True
        seen.add(id(node))
        todo += index.reads(node) if index.at(value) >= 0 else []
    return False

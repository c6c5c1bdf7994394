"""Mixtures whose experts are no pairs of products, told by what a router does with their results.

    table (T, E) from a TopK, a Softmax, ...        f_e(x) * table[:, e]        or Where(ids == e, f_e(x), 0)

``f_e`` may be one product, a bilinear form, a recurrent layer, a transposed convolution or a vector: anything that has
constants of its own, as many and of the same shapes for each e.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import whole_numbers_made
from moeopt.onnx_in.products import WeightProduct, shape_of, weight_products
from moeopt.onnx_in.regions import region_name
from moeopt.value_types import OnnxNode, OnnxValue

_CHOICES = frozenset(("TopK", "ArgMax", "Softmax", "Sigmoid", "Hardmax"))
_MOVED = frozenset(
    ("Unsqueeze", "Squeeze", "Reshape", "Cast", "ReduceSum", "ReduceMax", "Expand", "Transpose", "Mul", "Where")
    + ("Identity", "Not", "And")
)
"""Between an expert's column of a table and what multiplies its result."""
_NEAR, _FAR = 10, 64
"""Nodes between a factor and its column, a column and the choice; and nodes of one expert."""


@dataclass(frozen=True)
class WeighedResults:
    """The functions that the columns of one table weigh: their name, how many, and what they hold."""

    name: str
    experts: int
    operators: str


def weighed_results(index: GraphIndex, known: Collection[int]) -> Iterator[WeighedResults]:
    """Every such mixture of a graph, in order.

    ``known``: identities of the nodes of blocks that have entries.
    """
    tables: dict[int, dict[Hashable, tuple[OnnxNode, OnnxValue]]] = {}
    routed: dict[int, bool] = {}
    for node in index.nodes:
        if node.op_type not in ("Mul", "Where") or id(node) in known:
            continue
        for factor, result in _sides(node):
            column = _column(index, factor)
            if column is None or index.is_constant(result):
                continue
            table, place = column
            if id(table) not in routed:
                routed[id(table)] = _is_routed(index, table)
            if routed[id(table)]:
                tables.setdefault(id(table), {}).setdefault(place, (node, result))
    for by_place in tables.values():
        found = _alike(index, [result for _, result in by_place.values()])
        if found is not None:
            yield found


def _sides(node: OnnxNode) -> tuple[tuple[OnnxValue, OnnxValue], ...]:
    first, second = node.inputs[0], node.inputs[1]
    return ((first, second), (second, first)) if node.op_type == "Mul" else ((first, second),)


def _column(index: GraphIndex, value: OnnxValue) -> tuple[OnnxValue, Hashable] | None:
    """The table whose column at a constant place a value is made of, and the place; None where it is no such value."""
    todo, seen = [value], 0
    while todo and seen < _NEAR:
        node = todo.pop(0).producer()
        seen += 1
        if node is None:
            continue
        held = whole_numbers_made(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if node.op_type in ("Gather", "Slice", "Equal") and held is not None and len(held) == 1:
            return node.inputs[0], held[0]
        if node.op_type == "Split" and len(node.outputs) > 1:
            return node.inputs[0], list(node.outputs).index(next(v for v in node.outputs if _leads(v, value)))
        if node.op_type in _MOVED:
            todo += [v for v in node.inputs if v is not None and not index.is_constant(v)]
    return None


def _leads(start: OnnxValue, value: OnnxValue) -> bool:
    """Whether ``value`` is ``start``, or made of it through what moves data."""
    todo, seen = [value], 0
    while todo and seen < _NEAR:
        here = todo.pop(0)
        seen += 1
        if here is start:
            return True
        node = here.producer()
        if node is not None and node.op_type in _MOVED:
            todo += [v for v in node.inputs if v is not None]
    return False


def _is_routed(index: GraphIndex, table: OnnxValue) -> bool:
    """Whether a table is made by a choice, with no product with weights between."""
    products = weight_products(index)
    todo, seen = [table], set[int]()
    while todo and len(seen) < _FAR:
        at = index.at(todo.pop(0))
        if at < 0 or at in seen or at in products:
            continue
        seen.add(at)
        if index.nodes[at].op_type in _CHOICES:
            return True
        todo += [v for v in index.reads(index.nodes[at]) if not index.is_constant(v)]
    return False


def _alike(index: GraphIndex, results: list[OnnxValue]) -> WeighedResults | None:
    """The functions behind ``results`` where each has constants of its own, of the same shapes as the others'."""
    behind = [_behind(index, result) for result in results]
    times = Counter(at for nodes in behind for at in nodes)
    experts: list[tuple[tuple[str, tuple[int, ...]], ...]] = []
    held: list[WeightProduct] = []
    for nodes in behind:
        own = sorted(at for at in nodes if times[at] == 1)
        weights = [(at, v, shape) for at in own for v in index.nodes[at].inputs if (shape := _weight(index, v))]
        experts.append(tuple((index.nodes[at].op_type, shape) for at, _, shape in weights))
        held += [WeightProduct(at, index.nodes[at], v, v, shape, False) for at, v, shape in weights]
    if len(experts) < 2 or not experts[0] or len(set(experts)) > 1:
        return None
    operators = ", ".join(dict.fromkeys(operator for operator, _ in experts[0]))
    name = region_name(held) or f"weighed_{index.at(results[0])}"
    return WeighedResults(name, len(experts), operators)


def _behind(index: GraphIndex, result: OnnxValue) -> set[int]:
    todo, found = [result], set[int]()
    while todo and len(found) < _FAR:
        at = index.at(todo.pop(0))
        if at >= 0 and at not in found:
            found.add(at)
            todo += [v for v in index.reads(index.nodes[at]) if not index.is_constant(v)]
    return found


def _weight(index: GraphIndex, value: OnnxValue) -> tuple[int, ...]:
    """The shape of a constant of several floats; () of any other value."""
    if value is None or not index.is_constant(value) or value.dtype is None or not value.dtype.is_floating_point():
        return ()
    shape = shape_of(value) or ()
    return shape if math.prod(shape) > 1 else ()

"""Mixtures whose experts are no pairs of products, told by what a router does with their results.

    table (T, E) from a TopK, a Softmax, ...        f_e(x) * table[:, e]        or Where(ids == e, f_e(x), 0)

``f_e`` may be one product, a bilinear form, a recurrent layer, a transposed convolution or a vector: anything that has
constants of its own, as many and of the same shapes for each e.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

from moeopt.onnx_in.chains import ExpertChains, weight_shape
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import whole_numbers_made
from moeopt.onnx_in.products import WeightProduct, shape_of, weight_products
from moeopt.value_types import OnnxNode, OnnxValue

CHOICES = frozenset(("TopK", "ArgMax", "Softmax", "Sigmoid", "Hardmax"))
_MOVED = frozenset(
    ("Unsqueeze", "Squeeze", "Reshape", "Cast", "ReduceSum", "ReduceMax", "Expand", "Transpose", "Mul", "Where")
    + ("Identity", "Not", "And")
)
"""Between an expert's column of a table and what multiplies its result."""
_NEAR, _FAR = 10, 64
"""Nodes between a factor and its column, a column and the choice; and nodes of one expert."""


@dataclass(frozen=True)
class WeighedResults:
    """The functions that the columns of one table weigh.

    Attributes:
        weights: what they have for their own, those of the first function first.
        products: the products that each has, the first's first; () where one has none.
        at: where the first one's result is made.
    """

    experts: int
    operators: str
    weights: tuple[WeightProduct, ...]
    products: tuple[tuple[WeightProduct, ...], ...]
    at: int


def weighed_results(index: GraphIndex, known: Collection[int]) -> Iterator[WeighedResults]:
    """Every such mixture of a graph, in order.

    ``known``: identities of the nodes of blocks that have entries.
    """
    tables: dict[int, dict[Hashable, list[OnnxValue]]] = {}
    routed: dict[int, bool] = {}
    for node in index.nodes:
        if node.op_type not in ("Mul", "Where") or id(node) in known:
            continue
        for factor, result in weighed_sides(node):
            if id(result.producer()) in known or index.is_constant(result):
                continue
            column = column_of(index, factor)
            if column is None:
                continue
            table, place = column
            if id(table) not in routed:
                routed[id(table)] = is_routed(index, table)
            if routed[id(table)]:
                tables.setdefault(id(table), {}).setdefault(place, []).append(result)
    for by_place in tables.values():
        for several in zip_longest(*by_place.values()):  # a column may weigh several: of two blocks, or of the router
            found = _alike(index, [result for result in several if result is not None])
            if found is not None:
                yield found


def weighed_sides(node: OnnxNode) -> tuple[tuple[OnnxValue, OnnxValue], ...]:
    """What may weigh something in a ``Mul`` or keep it in a ``Where``, each with that."""
    first, second = node.inputs[0], node.inputs[1]
    return ((first, second), (second, first)) if node.op_type == "Mul" else ((first, second),)


def column_of(index: GraphIndex, value: OnnxValue) -> tuple[OnnxValue, Hashable] | None:
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


def is_routed(index: GraphIndex, table: OnnxValue) -> bool:
    """Whether a value is made by a choice, with no product with weights between."""
    products = weight_products(index)
    todo, seen = [table], set[int]()
    while todo and len(seen) < _FAR:
        at = index.at(todo.pop(0))
        if at < 0 or at in seen or at in products:
            continue
        seen.add(at)
        if index.nodes[at].op_type in CHOICES:
            return True
        todo += [v for v in index.reads(index.nodes[at]) if not index.is_constant(v)]
    return False


def _alike(index: GraphIndex, results: list[OnnxValue]) -> WeighedResults | None:
    """The functions behind ``results`` where each has constants of its own, of the same shapes as the others'."""
    behind = [_behind(index, result) for result in results]
    times = Counter(at for nodes in behind for at in nodes)
    products = weight_products(index)
    held: list[list[WeightProduct]] = []
    for nodes in behind:
        own = [at for at in sorted(nodes) if times[at] == 1]
        held.append([one for at in own for one in _weights(index, at, products)])
    if len(held) < 2 or not held[0] or len({tuple(map(_shape_of_weight, own)) for own in held}) > 1:
        return None
    operators = ", ".join(dict.fromkeys(str(one.node.op_type) for one in held[0]))
    several = tuple(tuple(one for one in own if one.at in products) for own in held)
    weights = tuple(one for own in held for one in own)
    return WeighedResults(len(held), operators, weights, several if all(several) else (), index.at(results[0]))


def _weights(index: GraphIndex, at: int, products: Mapping[int, WeightProduct]) -> Iterator[WeightProduct]:
    """The constants of several floats that a node reads, that of a product as it is multiplied."""
    node = index.nodes[at]
    if at in products:
        yield products[at]
    for value in node.inputs:
        if (shape := _weight(index, value)) and (at not in products or value is not products[at].weight):
            yield WeightProduct(-1 - at, node, value, value, shape, False)


def _shape_of_weight(weight: WeightProduct) -> Hashable:
    return weight_shape(weight) if weight.at >= 0 else (weight.shape, weight.node.op_type)


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


def blocks_of_one_table(index: GraphIndex, chains: ExpertChains) -> list[ExpertChains]:
    """Chains of alike blocks whose results the same columns of one table weigh, those of each block for themselves."""
    places: dict[int, Hashable] = {}
    for _, last in chains.pairs:
        places[last.at] = places.get(last.at) or next(places_of_weights(index, last), None)
    times = set(Counter(places.values()).values())
    if None in places.values() or len(times) > 1 or times == {1}:
        return [chains]
    seen: Counter[Hashable] = Counter()
    block: dict[int, int] = {}
    for at in sorted(places):
        block[at] = seen[places[at]]
        seen[places[at]] += 1
    numbers = range(max(block.values()) + 1)
    return [replace(chains, pairs=[p for p in chains.pairs if block[p[1].at] == number]) for number in numbers]


def places_of_weights(index: GraphIndex, product: WeightProduct) -> Iterator[Hashable]:
    """The tables whose columns weigh what a product gives, each with the column's place: several of one table where
    equal experts are computed once."""
    todo, made = [product.at], {id(v) for v in product.node.outputs}
    for _ in range(_NEAR):
        if not todo:
            break
        node = index.nodes[todo.pop(0)]
        for factor, result in weighed_sides(node) if node.op_type in ("Mul", "Where") else ():
            column = column_of(index, factor) if id(result) in made else None
            if column is not None and is_routed(index, column[0]):
                yield id(column[0]), column[1]
        made |= {id(v) for v in node.outputs}
        todo += [at for v in node.outputs for at in index.readers(v) if at not in weight_products(index)]

"""Experts of one product each, as chains: those whose results a router weighs one by one, or whose rows it picks.

    y = sum over e of table[:, e] * (x W_e + b_e)       table (T, E) from a TopK, a Softmax, comparisons of ids
    y[rows_e] += w_e * (x[rows_e] W_e + b_e)            rows_e: where ids are e
    y = sum over e of (table[:, e] * x) W_e             the same, weighed before
    y = sum over k of w_k * stack(x W_e + b_e)[ids_k]   all run, and the choice picks among the results

Projections that nothing chooses among (those of an attention, gates of a recurrent cell) are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

from moeopt.onnx_in.chains import ExpertChains, moved_from, weight_input, weight_shape
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.products import WeightProduct, weight_products
from moeopt.onnx_in.products_of_all import products_of_all
from moeopt.onnx_in.prologues import shared_beginnings
from moeopt.onnx_in.weighed_results import column_of, is_routed, weighed_results, weighed_sides
from moeopt.value_types import OnnxNode, OnnxValue

_PICKS = frozenset(("Gather", "GatherND", "Compress"))
"""Operators that pick rows."""
_JOINS = frozenset(("Concat", "SequenceConstruct"))
_VIEWS = 16
"""Nodes between a product and the value that its rows are of."""


def single_chains(index: GraphIndex, within: Collection[int]) -> Iterator[ExpertChains]:
    """The mixtures of a graph among its products outside of those ``within`` chains of two, by their positions."""
    yield from products_of_all(index, weight_products(index).keys() - within)
    open_ = {at: p for at, p in weight_products(index).items() if at not in within and _is_of_one(p)}
    if len(open_) < 2:
        return
    for found in weighed_results(index, {id(index.nodes[at]) for at in within}):
        if found.products and all(p.at in open_ for own in found.products for p in own):
            yield from _from_one_root(index, [(own[0], own[-1]) for own in found.products])
            for product in (p for own in found.products for p in own):
                open_.pop(product.at)
    every = weight_products(index).values()  # one of a gated pair may be in a chain of two, and the other open
    picked = _each_its_own([(_rows_picked(index, p), p) for p in every], open_)
    scaled = _each_its_own([(_weighed_by(index, p), p) for p in every], open_)
    for several in (picked, scaled, *_joined_and_picked(index, list(open_.values()))):
        yield from _from_one_root(index, [(p, p) for p in several if p.at in open_])
        for product in several:
            open_.pop(product.at, None)


def _is_of_one(product: WeightProduct) -> bool:
    """Whether a product is by one matrix, which nodes may have taken out of a stack."""
    return product.stacked == 1 or len(weight_shape(product)[0]) == 2


def _matrix(product: WeightProduct) -> Hashable:
    """What tells a product's matrix from others, of one stack too."""
    return product.function if product.stacked == 1 else weight_input(product)


def _each_its_own(found: Sequence[tuple[Hashable, WeightProduct]], open_: Collection[int]) -> list[WeightProduct]:
    """The products at the ``open_`` positions that have a part of a choice for their own: projections of the same
    chosen rows are no experts."""
    times = Counter(part for part, _ in found)
    return [product for part, product in found if part is not None and times[part] == 1 and product.at in open_]


def _from_one_root(index: GraphIndex, pairs: Collection[tuple[WeightProduct, WeightProduct]]) -> Iterator[ExpertChains]:
    """The experts of rows of the same value, or of what a prologue of each makes of it, with matrices of one shape.

    Args:
        pairs: the first and the last product of each.
    """
    roots = [_root(index, first) for first, _ in pairs]
    if len({id(root) for root in roots}) == len(roots):
        products = weight_products(index)
        roots = [start or root for start, root in zip(shared_beginnings(index, roots, products), roots, strict=True)]
    groups: dict[Hashable, ExpertChains] = {}
    for root, pair in zip(roots, pairs, strict=True):
        groups.setdefault((id(root), *map(weight_shape, pair)), ExpertChains(root)).pairs.append(pair)
    for chains in groups.values():
        if len({_matrix(first) for first, _ in chains.pairs}) == len(chains.pairs) > 1:
            yield chains.with_shapes_seen()


def _root(index: GraphIndex, product: WeightProduct) -> OnnxValue:
    """What a product's rows are rows of, before a choice weighed them."""
    weighed = _weighing(index, product)
    return _rows_of(index, product.rows if weighed is None else weighed[0])[-1]


def _weighing(index: GraphIndex, product: WeightProduct) -> tuple[OnnxValue, OnnxValue, Hashable] | None:
    """The rows that a product is given times a column of a router's table, the table and the column's place."""
    node = product.rows.producer()
    for factor, rows in weighed_sides(node) if node is not None and node.op_type == "Mul" else ():
        column = column_of(index, factor)
        if column is not None and is_routed(index, column[0]):
            return rows, *column
    return None


def _weighed_by(index: GraphIndex, product: WeightProduct) -> Hashable:
    """The column that weighs a product's rows; None where none does."""
    weighed = _weighing(index, product)
    return None if weighed is None else (id(weighed[1]), weighed[2])


def _rows_picked(index: GraphIndex, product: WeightProduct) -> Hashable:
    """Which rows a choice picks for a product, or which part of them; None where none does."""
    part = None
    for value in _rows_of(index, product.rows)[:-1]:
        node = value.producer()
        if node.op_type in (*_PICKS, "Split", "Slice"):
            part = part or id(value)
        if node.op_type in _PICKS and not index.is_constant(node.inputs[1]) and is_routed(index, node.inputs[1]):
            return part
    return None


def _joined_and_picked(index: GraphIndex, products: Sequence[WeightProduct]) -> list[list[WeightProduct]]:
    """The products whose results, or functions of each element, lie side by side where a choice picks among them."""
    joined: dict[int, list[WeightProduct]] = {}
    for product in products:
        home = _next(index, product.at, lambda node: node.op_type in _JOINS)
        if home is not None:
            joined.setdefault(home, []).append(product)
    return [found for home, found in joined.items() if len(found) > 1 and _is_picked_from(index, home)]


def _is_picked_from(index: GraphIndex, joined: int) -> bool:
    """Whether a node picks from what another one joins, by what a choice says."""
    pick = _next(index, joined, lambda node: node.op_type in (*_PICKS, "GatherElements"))
    ids = None if pick is None else index.nodes[pick].inputs[1]
    return ids is not None and not index.is_constant(ids) and is_routed(index, ids)


def _next(index: GraphIndex, start: int, wanted: Callable[[OnnxNode], bool]) -> int | None:
    """The node that reads what a node gives, alone, moved or with constants; the first that is ``wanted``."""
    at = start
    for _ in range(_VIEWS):
        readers = index.readers(index.nodes[at].outputs[0])
        if len(readers) != 1:
            return None
        (at,) = readers
        node = index.nodes[at]
        if wanted(node):
            return at
        given = [v for v in node.inputs if v is not None and not index.is_constant(v) and not index.is_size(v)]
        if len(given) != 1 or len(node.outputs) != 1:
            return None
    return None


def _rows_of(index: GraphIndex, rows: OnnxValue) -> list[OnnxValue]:
    """The rows of a product, and what they are views or parts of, the last no such thing itself."""
    found = [rows]
    while len(found) < _VIEWS:
        node = found[-1].producer()
        source = None if node is None or index.at(found[-1]) < 0 else moved_from(index, node)
        if source is None or node.op_type == "Concat":
            break
        found.append(source)
    return found

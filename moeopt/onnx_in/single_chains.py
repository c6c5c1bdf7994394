"""Experts of one product each, as chains: those whose results a router weighs one by one, or whose rows it picks.

    y = sum over e of table[:, e] * (x W_e + b_e)       table (T, E) from a TopK, a Softmax, comparisons of ids
    y[rows_e] += w_e * (x[rows_e] W_e + b_e)            rows_e: where ids are e
    y = sum over k of w_k * stack(x W_e + b_e)[ids_k]   all run, and the choice picks among the results

Projections that nothing chooses among (those of an attention, gates of a recurrent cell) are none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

from moeopt.onnx_in.chains import ExpertChains, moved_from, weight_shape
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.products import WeightProduct
from moeopt.onnx_in.weighed_results import is_routed, weighed_results
from moeopt.value_types import OnnxNode, OnnxValue

_PICKS = frozenset(("Gather", "GatherND", "Compress"))
"""Operators that pick rows."""
_JOINS = frozenset(("Concat", "SequenceConstruct"))
_VIEWS = 16
"""Nodes between a product and the value that its rows are of."""


def single_chains(index: GraphIndex, products: Sequence[WeightProduct]) -> Iterator[ExpertChains]:
    """The mixtures among ``products``, which are in no chain of two."""
    open_ = {p.at: p for p in products if p.stacked == 1}
    if len(open_) < 2:
        return
    for found in weighed_results(index, ()):
        if found.products and all(p.at in open_ for p in found.products):
            yield from _from_one_root(index, found.products)
            for product in found.products:
                open_.pop(product.at)
    picked = [p for p in open_.values() if _picked_by_a_choice(index, p)]
    for several in (picked, *_joined_and_picked(index, list(open_.values()))):
        yield from _from_one_root(index, [p for p in several if p.at in open_])
        for product in several:
            open_.pop(product.at, None)


def _from_one_root(index: GraphIndex, products: Collection[WeightProduct]) -> Iterator[ExpertChains]:
    """The ``products`` of rows of the same value with matrices of their own and of one shape, together."""
    groups: dict[Hashable, ExpertChains] = {}
    for product in products:
        root = _rows_of(index, product)[-1]
        chains = groups.setdefault((id(root), weight_shape(product)), ExpertChains(root))
        chains.pairs.append((product, product))
    for chains in groups.values():
        if len({first.function for first, _ in chains.pairs}) == len(chains.pairs) > 1:
            yield chains.with_shapes_seen()


def _picked_by_a_choice(index: GraphIndex, product: WeightProduct) -> bool:
    for value in _rows_of(index, product)[:-1]:
        node = value.producer()
        if node.op_type in _PICKS and not index.is_constant(node.inputs[1]) and is_routed(index, node.inputs[1]):
            return True
    return False


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


def _rows_of(index: GraphIndex, product: WeightProduct) -> list[OnnxValue]:
    """The rows of a product, and what they are views or parts of, the last no such thing itself."""
    found = [product.rows]
    while len(found) < _VIEWS:
        node = found[-1].producer()
        source = None if node is None or index.at(found[-1]) < 0 else moved_from(index, node)
        if source is None or node.op_type == "Concat":
            break
        found.append(source)
    return found

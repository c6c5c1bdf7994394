"""Chains of two products with weights that are feed-forward functions, those that begin at the same rows together.

A chain is read by values: two products in a row, with whatever is computed element by element between them. Chains
that begin at the same rows and whose weights have the same shapes are experts, be they written one after another or as
one product of a stack. A lone pair of plain matrices is a dense feed-forward network. Functions of one product
(``single_chains``) are pairs of that product and itself.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import matrix_shape, shape_made
from moeopt.onnx_in.operators.table import operator_of
from moeopt.onnx_in.products import MOVING, PRODUCTS, WeightProduct
from moeopt.onnx_in.prologues import ancestors, shared_beginnings
from moeopt.value_types import OnnxNode, OnnxValue

_ENDS_CHAIN = frozenset(("Softmax", "LogSoftmax", "TopK", "ArgMax", "ArgMin", "OneHot", "NonZero", "Shape", "Size"))
"""Operators behind which nothing is a value of the product before them any more."""


@dataclass
class ExpertChains:
    """First and second products of feed-forward functions that begin at the same rows.

    ``in_several_shapes``: nodes bring the weights of some into shape otherwise than those of others, or some are parts
    of a constant that holds more, or not all of them.
    """

    root: OnnxValue
    pairs: list[tuple[WeightProduct, WeightProduct]] = field(default_factory=list)
    in_several_shapes: bool = False

    @property
    def experts(self) -> int:
        """How many functions there are, as far as the shapes of their weights say; several may share one of the two.

        A product that all of them follow, or that follows all of them, is none of theirs: the fewer count.
        """
        several = {(first.function, last.function): min(first.stacked, last.stacked) for first, last in self.pairs}
        return min(self.written, sum(several.values()))

    @property
    def share_weights(self) -> bool:
        """Whether several products of one side are by the same weight."""
        sides = list(zip(*self.pairs, strict=True))
        return any(len({p.function for p in side}) < len({p.at for p in side}) for side in sides)

    @property
    def written(self) -> int:
        """How many times the functions stand in the file: several of them may share their weights, as tools store equal
        ones once."""
        counts = [sum({p.at: p.stacked for p in side}.values()) for side in zip(*self.pairs, strict=True)]
        fewest: int = min(counts)
        return fewest

    @property
    def may_be_one_network(self) -> bool:
        """Whether each product has a part of one plain matrix: neurons of a network that is computed piece by piece, if
        nothing weighs the pieces."""
        sides = list(zip(*self.pairs, strict=True))
        return all(p.part and not p.of_stack for side in sides for p in side) and all(
            len({id(p.weight) for p in side}) == 1 for side in sides
        )

    @property
    def products(self) -> list[WeightProduct]:
        return list({p.at: p for pair in self.pairs for p in pair}.values())

    def with_shapes_seen(self) -> ExpertChains:
        """These chains, once it is known whether their weights lie in several shapes."""
        self.in_several_shapes = any(_in_several_shapes(side) for side in zip(*self.pairs, strict=True))
        self.in_several_shapes &= not any("DequantizeLinear" in _views(product) for product in self.products)
        return self


def expert_chains(index: GraphIndex, products: dict[int, WeightProduct]) -> list[ExpertChains]:
    """The chains of a graph, grouped by where they begin, in the order of their first products."""
    last: dict[int, int] = {}
    root: dict[int, Any] = {}
    groups: dict[Any, ExpertChains] = {}
    by_shape: defaultdict[Any, set[int]] = defaultdict(set)
    for at, node in enumerate(index.nodes):
        if at in products:
            one = products[at]
            before = last.get(id(one.rows))
            if before is not None:
                first = products[before]
                start = root.get(id(first.rows), first.rows)
                key = (id(start), first.shape, one.shape, first.node.op_type, one.node.op_type)
                group = groups.setdefault(key, ExpertChains(start))
                if one.at not in by_shape[key]:
                    by_shape[key].add(one.at)
                    group.pairs.append((first, one))
            value = at
        else:
            recent = [last[id(v)] for v in index.reads(node) if id(v) in last]
            value = max(recent) if recent and node.op_type not in _ENDS_CHAIN and node.op_type not in _MERGING else -1
        source = moved_from(index, node)
        if source is not None and node.op_type == "Concat":  # of parts of one value, or rows are new
            joined = [v for v in node.inputs if v is not None and not index.is_constant(v)]
            source = source if len({id(root.get(id(v), v)) for v in joined}) == 1 else None
        for result in node.outputs:
            if value >= 0:
                last[id(result)] = value
            if source is not None:
                root[id(result)] = root.get(id(source), source)
    made = _with_prologues(index, _in_other_shapes(list(groups.values())), products, root)
    return [group.with_shapes_seen() for group in made]


def moved_from(index: GraphIndex, node: OnnxNode) -> OnnxValue | None:
    """The value whose elements a node gives in other places; None where it computes, or looks up in a constant."""
    source = node.inputs[0] if node.op_type in MOVING and node.inputs else None
    return None if source is None or index.is_constant(source) else source  # of a table, rows are new


def _in_several_shapes(products: Sequence[WeightProduct]) -> bool:
    """Whether the first, or the second, products of a group have weights that a reader of modules does not take as one
    stack or as separate tensors."""
    views = {_views(product) for product in products}
    if len(views) > 1 or (len(products) == 1 and not _OF_PARTS.isdisjoint(*views)):
        return True
    parts = {
        p.function: math.prod(p.shape[1:] if p.of_stack else matrix_shape(p.node, _weight_side(p)))
        for p in products
        if p.part
    }
    held = {id(p.weight): math.prod(p.shape) for p in products}
    return bool(parts) and (len(held) > 1 or sum(parts.values()) != sum(held.values()))


def _in_other_shapes(groups: list[ExpertChains]) -> list[ExpertChains]:
    """The groups, those joined that begin at the same rows and multiply matrices of the same shapes: a weight may lie
    turned or flat in the file, or in one constant with others, and be brought into shape by nodes."""
    homes: dict[Hashable, ExpertChains] = {}
    starts = Counter(id(g.root) for g in groups)
    for number, group in enumerate(groups):
        key: Hashable = (id(group.root), matrices(group)) if starts[id(group.root)] > 1 else number
        home = homes.setdefault(key, group)
        if home is not group:
            home.pairs = sorted([*home.pairs, *group.pairs], key=lambda pair: pair[0].at)
    return list(homes.values())


def _views(product: WeightProduct) -> tuple[str, ...]:
    """The operators between a product and its constant."""
    value, found = product.node.inputs[_weight_side(product)], []
    while value is not product.weight and value is not None:
        node = value.producer()
        found.append(node.op_type)
        value = node.inputs[0]
    return tuple(found)


def weight_input(product: WeightProduct) -> int:
    """The identity of the value that a product's node reads as its weight."""
    return id(product.node.inputs[_weight_side(product)])


def _weight_side(product: WeightProduct) -> int:
    """Which input of a product's node is its weight."""
    sides = PRODUCTS[operator_of(product.node)]
    return sides[0] if product.node.inputs[sides[1]] is product.rows else sides[1]


def matrices(group: ExpertChains) -> tuple[tuple[Any, ...], ...]:
    """What chains that are experts of one block have in common: the shapes of the two matrices as they are multiplied;
    a convolution's as they are, and those that are not to be seen as they are stored."""
    return tuple(weight_shape(product) for product in group.pairs[0])


def weight_shape(product: WeightProduct) -> tuple[Any, ...]:
    """The shape of a product's matrix as it is multiplied; with the operator where that says how it is."""
    shape = matrix_shape(product.node, _weight_side(product))
    plain = shape and product.node.op_type in _PLAIN
    return (shape,) if plain else (shape or product.shape, product.node.op_type)


def columns_given(product: WeightProduct) -> int:
    """How many columns a product gives for a row; 0 for a stack and a convolution, and for a weight that is made of
    more than its matrix."""
    if product.node.op_type == "MatMulNBits":
        return product.node.attributes["N"].as_int() if "N" in product.node.attributes else 0
    if len(product.shape) != 2 or not _ALIKE.issuperset(_views(product)):
        return 0
    side = _weight_side(product)
    if product.node.op_type == "Einsum":
        return _columns_of_einsum(product.node, side)
    shape = matrix_shape(product.node, side)
    return shape[-1] if len(shape) == 2 else 0


def _columns_of_einsum(node: OnnxNode, side: int) -> int:
    """The size of the last axis of an ``Einsum``'s result, where that is one of its input ``side`` alone; else 0."""
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    own, shape = terms.split(",")[side], shape_made(node.inputs[side])
    single = bool(result) and len(own) == len(shape) and terms.count(result[-1]) == 1
    return shape[own.index(result[-1])] if single and result[-1] in own else 0


def _with_prologues(
    index: GraphIndex, groups: list[ExpertChains], products: Collection[int], root: Mapping[int, OnnxValue]
) -> list[ExpertChains]:
    """The groups, those of one chain alone joined that begin at the same value, each behind a prologue of its own; and
    those that have a prologue where several others, which have none, begin.
    """
    ends = {at for at, node in enumerate(index.nodes) if at in products or node.op_type in _MERGING}
    plain = {(id(g.root), matrices(g)): g for g in groups if len(g.pairs) > 1}
    joined: dict[int, ExpertChains] = {}
    alone: defaultdict[Any, list[ExpertChains]] = defaultdict(list)
    for group in groups:
        if len(group.pairs) == 1 and group.experts < 2:
            behind = ancestors(index, group.root, ends) if plain else ()
            homes_of = (plain.get((id(root.get(id(v), v)), matrices(group))) for v in behind)
            home = next((found for found in homes_of if found is not None), None)
            if home is None:
                alone[matrices(group)].append(group)
            else:
                home.pairs += group.pairs
                joined[id(group)] = home
    for several in alone.values():
        shared = shared_beginnings(index, [g.root for g in several], ends) if len(several) > 1 else []
        homes: dict[int, ExpertChains] = {}
        for group, start in zip(several, shared, strict=False):
            if start is not None:
                home = homes.setdefault(id(start), ExpertChains(start))
                home.pairs += group.pairs
                joined[id(group)] = home
    return list({id(home): home for home in (joined.get(id(g), g) for g in groups)}.values())


_ALIKE = frozenset(("Transpose", "Cast", "Identity", "DequantizeLinear", "Dropout"))
"""Operators that leave a matrix what it is, or turn it."""
_OF_PARTS = frozenset(("Slice", "Split", "Gather", "Concat"))
"""Operators whose result is a part of their first input, or more."""
_PLAIN = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
"""Products of rows with one matrix."""
_MERGING = frozenset(
    ("MatMul", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "Loop", "If", "Scan")
)
"""Operators that mix rows: a product behind them begins another chain."""

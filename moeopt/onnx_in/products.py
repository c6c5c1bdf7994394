"""Matrix products with constant weights, and the chains of two that are feed-forward functions.

A chain is read by values: two products in a row, with whatever is computed element by element between them. Chains
that begin at the same rows and whose weights have the same shapes are experts, be they written one after another or as
one product of a stack. A lone pair of plain matrices is a dense feed-forward network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.operators.table import operator_of
from moeopt.onnx_in.prologues import ancestors, shared_beginnings
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
_ENDS_CHAIN = frozenset(("Softmax", "LogSoftmax", "TopK", "ArgMax", "ArgMin", "OneHot", "NonZero", "Shape", "Size"))
"""Operators behind which nothing is a value of the product before them any more."""


@dataclass(frozen=True)
class WeightProduct:
    """A product with constant weights: its node's position, the rows it reads, the constant and its shape.

    ``scales``: of codes, the constant that they are multiplied with; None of floats.
    """

    at: int
    node: OnnxNode
    rows: OnnxValue
    weight: OnnxValue
    shape: tuple[int, ...]
    picked: bool
    scales: OnnxValue = None

    @property
    def function(self) -> tuple[int, int]:
        """What tells a matrix from others: two of the same codes are two matrices where their scales are two."""
        return id(self.weight), id(self.scales)

    @property
    def stacked(self) -> int:
        """How many matrices the weight holds, 1 for a plain one."""
        if self.node.op_type in CONVOLUTIONS or self.node.op_type == "MatMulNBits":
            return 1
        return self.shape[0] if len(self.shape) >= 3 else 1


@dataclass
class ExpertChains:
    """First and second products of feed-forward functions that begin at the same rows."""

    root: OnnxValue
    pairs: list[tuple[WeightProduct, WeightProduct]] = field(default_factory=list)

    @property
    def experts(self) -> int:
        """How many functions there are, as far as the shapes of their weights say.

        A product that all of them follow, or that follows all of them, is none of theirs: the fewer count.
        """
        counts = [sum({p.function: p.stacked for p in side}.values()) for side in zip(*self.pairs, strict=True)]
        fewest: int = min(counts)
        return fewest

    @property
    def products(self) -> list[WeightProduct]:
        return list({p.at: p for pair in self.pairs for p in pair}.values())


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
                if shape is not None and len(shape) >= 2:
                    scales = scales_of(node, node.inputs[weight])
                    found[at] = WeightProduct(at, node, value, constant, shape, picked, scales)
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
        for result in node.outputs:
            if value >= 0:
                last[id(result)] = value
            if node.op_type in MOVING and node.inputs and node.inputs[0] is not None:
                root[id(result)] = root.get(id(node.inputs[0]), node.inputs[0])
    return _with_prologues(index, list(groups.values()), products, root)


def _with_prologues(
    index: GraphIndex, groups: list[ExpertChains], products: Collection[int], root: Mapping[int, OnnxValue]
) -> list[ExpertChains]:
    """The groups, those of one chain alone joined that begin at the same value, each behind a prologue of its own; and
    those that have a prologue where several others, which have none, begin.
    """
    ends = {at for at, node in enumerate(index.nodes) if at in products or node.op_type in _MERGING}
    plain = {(id(g.root), _forms(g)): g for g in groups if len(g.pairs) > 1}
    joined: dict[int, ExpertChains] = {}
    alone: defaultdict[Any, list[ExpertChains]] = defaultdict(list)
    for group in groups:
        if len(group.pairs) == 1 and group.experts < 2:
            behind = ancestors(index, group.root, ends) if plain else ()
            homes_of = (plain.get((id(root.get(id(v), v)), _forms(group))) for v in behind)
            home = next((found for found in homes_of if found is not None), None)
            if home is None:
                alone[_forms(group)].append(group)
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


def _forms(group: ExpertChains) -> tuple[Hashable, ...]:
    """What chains that are experts of one block have in common."""
    return tuple((p.shape, p.node.op_type) for p in group.pairs[0])


_MERGING = frozenset(
    ("MatMul", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "Loop", "If", "Scan")
)
"""Operators that mix rows: a product behind them begins another chain."""


def dense(chains: Sequence[ExpertChains]) -> list[ExpertChains]:
    """Those of ``chains`` that are one function alone."""
    return [group for group in chains if group.experts < 2]

"""Products by the matrices of all experts at once, each expert's only one: of a stack, side by side, or looked up.

    x (T, in), W (E, in, out) -> MatMul, Einsum -> y (T, E, out)      weighed by a table (T, E), or picked from by ids
    x (T, in), W (in, E * out) -> MatMul, Gemm -> Reshape (T, E, out)    the same
    W (E, in, out)[ids] (T, K, in, out), x -> MatMul, Einsum -> y (T, K, out)

How many experts there are is what their router says: the columns of the product that its scores are made by. Heads of
an attention have a stack of matrices too, and no such router.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from moeopt.onnx_in.chains import ExpertChains, columns_given, moved_from, weight_shape
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.matrix_shapes import whole_numbers_made
from moeopt.onnx_in.products import WeightProduct, weight_products
from moeopt.onnx_in.weighed_results import CHOICES
from moeopt.value_types import OnnxNode, OnnxValue

_FAR = 64
"""Nodes behind a product, and between a table and the product of its scores."""
_WEIGH = frozenset(("Mul", "Where", "MatMul", "Einsum", "Gather", "GatherND", "GatherElements"))
"""Operators that weigh results, or pick from them, or add them up weighed."""


def products_of_all(index: GraphIndex, open_: Collection[int]) -> Iterator[ExpertChains]:
    """The mixtures whose experts are one product, among those at the ``open_`` positions."""
    for at in sorted(open_):
        product = weight_products(index)[at]
        experts, _ = _experts(index, product)
        if experts > 1:
            whole = replace(product, of_all=experts)
            behind = [] if product.picked else _before(index, product)
            firsts = [replace(p, of_all=experts) for p in behind if _cut_into(index, p) == experts]
            root = _root(index, (firsts or [whole])[0].rows)
            yield ExpertChains(root, [(first, whole) for first in firsts] or [(whole, whole)])


def of_two_blocks(index: GraphIndex, chains: ExpertChains) -> bool:
    """Whether chains are the one product of a block and that of the next: each has a router of its own."""
    if len(chains.pairs) > 1 or not all(product.of_stack for product in chains.pairs[0]):
        return False
    routers = [router for experts, router in (_experts(index, product) for product in chains.pairs[0]) if experts > 1]
    return len(routers) > 1 and routers[0] != routers[1]


def _experts(index: GraphIndex, product: WeightProduct) -> tuple[int, int]:
    """How many experts a product is of, and the position of their router's product; 0 where it is not seen to be of
    several."""
    if product.picked:
        ids = _ids(index, product)
        scored, router = (0, -1) if ids is None else _scored(index, ids)
        return (scored, router) if product.of_stack and product.shape[0] == scored else (0, -1)
    parts = 0 if product.of_stack else _cut_into(index, product)
    scored, router = _weighed_by(index, product) if product.of_stack or parts else (0, -1)
    if product.of_stack:
        whole = len(weight_shape(product)[0]) > 2 and not product.part  # nodes may have taken one out
        return (scored, router) if product.shape[0] == scored and whole else (0, -1)
    return (scored, router) if scored and scored == parts else (0, -1)


def _before(index: GraphIndex, product: WeightProduct) -> list[WeightProduct]:
    """The nearest products that the rows of another one are made of."""
    products = weight_products(index)
    todo, seen, found = [product.rows], set[int](), list[WeightProduct]()
    while todo and len(seen) < _FAR:
        at = index.at(todo.pop(0))
        if at < 0 or at in seen:
            continue
        seen.add(at)
        if at in products:
            found.append(products[at])
            continue
        todo += [v for v in index.reads(index.nodes[at]) if not index.is_constant(v) and not index.is_size(v)]
    return found


def _ids(index: GraphIndex, product: WeightProduct) -> OnnxValue | None:
    """What says which of a stack's matrices a product reads."""
    for value in product.node.inputs:
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Transpose":
            node = node.inputs[0].producer()
        if node is not None and node.op_type in ("Gather", "GatherND") and node.inputs[0] is product.weight:
            along = node.attributes.get("axis" if node.op_type == "Gather" else "batch_dims")
            return node.inputs[1] if along is None or along.as_int() == 0 else None
    return None


def _weighed_by(index: GraphIndex, product: WeightProduct) -> tuple[int, int]:
    """How many columns the table has that weighs, or picks from, what a product gives, and where the product of its
    scores is; (0, -1) where none is seen."""
    todo, seen = [product.at], {product.at}
    made = {id(v) for v in product.node.outputs}
    sides = list(product.node.inputs) if product.node.op_type == "Einsum" else []
    while todo and len(seen) < _FAR:
        at = todo.pop(0)
        node = index.nodes[at]
        others = sides if at == product.at else list(node.inputs) if node.op_type in _WEIGH else []
        for other in others:
            if other is None or id(other) in made or index.is_constant(other) or other is product.rows:
                continue
            scored = _scored(index, other)
            if scored[0]:
                return scored
        if at != product.at and (at in weight_products(index) or (others and node.op_type not in ("Mul", "Where"))):
            continue
        made |= {id(v) for v in node.outputs}
        for reader in (r for v in node.outputs for r in index.readers(v)):
            if reader not in seen:
                seen.add(reader)
                todo.append(reader)
    return 0, -1


def _scored(index: GraphIndex, table: OnnxValue) -> tuple[int, int]:
    """How many columns the scores have that a choice behind ``table`` is made by, and where their product is."""
    products = weight_products(index)
    todo, seen, chosen = [table], set[int](), False
    scored: set[int] = set()  # the products
    while todo and len(seen) < _FAR:
        at = index.at(todo.pop(0))
        if at < 0 or at in seen:
            continue
        seen.add(at)
        if at in products:
            scored.add(at)
            continue
        chosen |= index.nodes[at].op_type in CHOICES
        todo += [v for v in index.reads(index.nodes[at]) if not index.is_constant(v)]
    if not chosen or len(scored) != 1:
        return 0, -1
    (router,) = scored
    return columns_given(products[router]), router


def _cut_into(index: GraphIndex, product: WeightProduct) -> int:
    """Into how many parts of neighbouring columns a ``Reshape`` cuts what a product gives; 0 where none does."""
    columns, at = columns_given(product), product.at
    for _ in range(_FAR):
        readers = index.readers(index.nodes[at].outputs[0])
        if len(readers) != 1:
            return 0
        (at,) = readers
        node = index.nodes[at]
        if node.op_type == "Reshape":
            parts, width = _last_two(index, node)
            return parts if parts > 1 and parts * width == columns else 0
        if len([v for v in node.inputs if v is not None and not index.is_constant(v)]) != 1:
            return 0
    return 0


def _last_two(index: GraphIndex, node: OnnxNode) -> tuple[int, int]:
    """The last two sizes that a ``Reshape`` asks for, where these are constants; else (0, 0)."""
    shape = node.inputs[1]
    held = whole_numbers_made(shape)
    if held is None and (made := shape.producer()) is not None and made.op_type == "Concat":
        ends = [whole_numbers_made(v) if index.is_constant(v) else None for v in made.inputs]
        held = tuple(n for end in ends for n in (end or (0,)))
    return (held[-2], held[-1]) if held is not None and len(held) > 2 else (0, 0)


def _root(index: GraphIndex, rows: OnnxValue) -> OnnxValue:
    """What a product's rows are a view of."""
    for _ in range(_FAR):
        node = rows.producer()
        source = None if node is None or index.at(rows) < 0 else moved_from(index, node)
        if source is None or node.op_type == "Concat":
            break
        rows = source
    return rows

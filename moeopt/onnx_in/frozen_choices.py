"""Choices of experts that an export froze although every expert may be there: what the router chooses is not read.

    ids that nobody reads     TopK -> weights used, ids not: the experts that get these weights are constants
    places in a list of hits  W[hits[0]], W[hits[1]], ...: as many experts run as the sample hit
    constant columns          scores[:, [0, 2]]: the experts that get these are the sample's

``values`` of a ``TopK`` may be a threshold for its own scores, whose experts nothing has to name: such ones are no
frozen choices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from moeopt.onnx_in.chains import columns_given
from moeopt.onnx_in.index import MEASURES, GraphIndex
from moeopt.onnx_in.matrix_shapes import whole_numbers_made
from moeopt.onnx_in.products import MOVING, WeightProduct, shape_of, weight_products
from moeopt.value_types import OnnxNode, OnnxValue

_NEAR = 16
"""Nodes between a choice and the product that its scores come of."""
_SCORES = frozenset(("Add", "Mul", "Div", "Softmax", "Sigmoid", "Cast", "Identity", "Reshape", "Clip"))
"""Operators between a router's product and its scores."""
_FAR = 64
"""Nodes behind a choice, and before a weight, that are looked at."""


def unread_choice(index: GraphIndex, choice: OnnxNode | None) -> bool:
    """Whether a ``TopK``'s values are used and its ids are not, and the values are no threshold for its scores."""
    if choice is None or choice.op_type != "TopK" or len(choice.outputs) < 2:
        return False
    values, ids = choice.outputs[:2]
    if index.readers(ids) or id(ids) in index.ends or not index.readers(values):
        return False
    scores = _scores(index, choice)
    made = {index.at(values), *map(index.at, scores)}
    behind = _nodes_behind(index, [values], made)
    if any(_chooses(index.nodes[at]) for at in behind):
        return False
    return behind.isdisjoint(_nodes_behind(index, scores, made))


def _chooses(node: OnnxNode) -> bool:
    """Whether something reads which ones a node chooses: those before may choose groups for it."""
    return node.op_type in ("TopK", "ArgMax") and bool(node.outputs[-1].uses())


def _scores(index: GraphIndex, choice: OnnxNode) -> list[OnnxValue]:
    """What a choice is made of: its scores, and the values before them up to a product with weights."""
    products = weight_products(index)
    found = [choice.inputs[0]]
    while len(found) < _NEAR and index.at(found[-1]) >= 0 and index.at(found[-1]) not in products:
        reads = [v for v in index.reads(index.nodes[index.at(found[-1])]) if not index.is_constant(v)]
        if not reads:
            break
        found.append(reads[0])
    return found


def results_weighed_by(index: GraphIndex, choice: OnnxNode, products: dict[int, WeightProduct]) -> WeightProduct | None:
    """The product whose result, or a function of it, is multiplied by a choice's values; None where there is none."""
    behind = _nodes_behind(index, [choice.outputs[0]], ())
    weighed = {id(v) for at in behind for v in index.nodes[at].outputs} | {id(choice.outputs[0])}
    for at in sorted(behind):
        node = index.nodes[at]
        if node.op_type == "Mul" and sum(id(v) in weighed for v in node.inputs) == 1:
            value = next(v for v in node.inputs if id(v) not in weighed)
            found = _product_before(index, value, products)
            if found is not None:
                return found
    return None


def listed_hits(index: GraphIndex, products: Iterable[WeightProduct]) -> OnnxNode | None:
    """The node that picks an expert's weights by a constant place in a list that data make, if there is one."""
    for product in products:
        if not product.picked:
            continue
        pick = _pick_before(index, product)
        place = None if pick is None else _constant_place(index, pick.inputs[1])
        if place is not None:
            return place
    return None


def constant_columns(index: GraphIndex, nodes: Iterable[OnnxNode], experts: int) -> str:
    """What is said where a node takes the scores of so many ``experts`` at constant places; "" where they are all, or
    none is taken so. A column that something else takes, as the gate of a shared expert, was no choice.
    """
    products = weight_products(index)
    for node in nodes:
        axis = node.attributes.get("axis")
        last = axis is not None and axis.as_int() in (1, -1)
        if node.op_type != "Gather" or not last or not index.is_constant(node.inputs[1]):
            continue
        shape, value = shape_of(node.inputs[1]), node.inputs[0]
        for _ in range(_NEAR):
            if _takes_others(index, value, node):
                break
            product = products.get(index.at(value))
            made = value.producer()
            if product is not None:
                scored = columns_given(product)
                if shape == (experts,) and scored > experts > 1:
                    return (
                        "unless the others are meant for no expert, which a file does not tell: of the "
                        f"{scored} experts that its router scores, the node {node.name!r} ({node.op_type}) takes the "
                        f"same {experts} for every token, and the file holds these. An export that traces a choice "
                        "which became Python numbers keeps that of its sample"
                    )
            if product is not None or made is None or made.op_type not in _SCORES:
                break
            value = next((v for v in made.inputs if v is not None and not index.is_constant(v)), None)
            if value is None:
                break
    return ""


def _takes_others(index: GraphIndex, scores: OnnxValue, taker: OnnxNode) -> bool:
    """Whether another node takes columns of ``scores`` that ``taker``, a Gather, leaves."""
    own = set(whole_numbers_made(taker.inputs[1]) or ())
    others = [index.nodes[at] for at in index.readers(scores) if index.nodes[at] is not taker]
    gathers = [n for n in others if n.op_type == "Gather" and index.is_constant(n.inputs[1])]
    columns = {c for n in gathers for c in whole_numbers_made(n.inputs[1]) or ()}
    return not columns <= own or any(n.op_type in ("Slice", "Split") for n in others)


def _pick_before(index: GraphIndex, product: WeightProduct) -> OnnxNode | None:
    """The ``Gather`` with an index that data make, between a product and its constant weight."""
    value = next(v for v in product.node.inputs if v is not None and v is not product.rows)
    while value is not product.weight and value is not None:
        node = value.producer()
        if node is None or (node.op_type in ("Gather", "GatherND") and not index.is_constant(node.inputs[1])):
            return node
        value = node.inputs[0]
    return None


def _constant_place(index: GraphIndex, value: OnnxValue) -> OnnxNode | None:
    """The node that takes a constant place of what a ``NonZero`` gives."""
    place = None
    for _ in range(_FAR):
        node = None if value is None or index.is_constant(value) else value.producer()
        if node is None or node.op_type == "NonZero":
            return place if node is not None else None
        if node.op_type not in MOVING:
            return None
        if node.op_type == "Gather" and index.is_constant(node.inputs[1]):
            place = place or node
        value = node.inputs[0]
    return None


def _nodes_behind(index: GraphIndex, values: list[OnnxValue], but: Collection[int]) -> set[int]:
    """The positions of the nodes near ``values`` that read them, or what is made of them."""
    todo = [at for v in values for at in index.readers(v) if at not in but]
    found: set[int] = set()
    while todo and len(found) < _FAR:
        at = todo.pop(0)
        if at not in found and index.nodes[at].op_type not in MEASURES:
            found.add(at)
            todo += [reader for v in index.nodes[at].outputs for reader in index.readers(v)]
    return found


def _product_before(index: GraphIndex, value: OnnxValue, products: dict[int, WeightProduct]) -> WeightProduct | None:
    """The nearest product with weights that a value is made of."""
    todo, seen = [value], set[int]()
    while todo and len(seen) < _FAR:
        at = index.at(todo.pop(0))
        if at in products:
            return products[at]
        if at >= 0 and at not in seen:
            seen.add(at)
            todo += [v for v in index.reads(index.nodes[at]) if not index.is_constant(v)]
    return None

"""Routing that an export froze: a file that runs the experts which one sample chose, whatever its inputs are.

A tracer records what a loop over the experts that are hit did on its sample. Seven things tell such a file:

    rows that are a constant    an expert is given the rows of the sample, by their numbers, for ever
    counts that are constants   an expert is given as many of the sorted rows as it had of the sample
    experts that are missing    the router scores more experts than there are functions; what goes to the others is lost
    choices that nobody reads   the weights of the choice are used, and which experts get them is a constant: a network
                                that is scaled by its highest score looks the same, so this is said with an "unless"
    places in a list of hits    as many experts run as the sample hit
    constant columns            the scores of the sample's experts are taken, whatever the router's others are
    constant capacities         an expert takes as many rows as the one with the most had of the sample

Such a file is broken. It computes what it computes, and nothing that moeopt could compare it with is right either: the
block is left alone, and its owner is told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

from moeopt.onnx_in.chains import columns_given
from moeopt.onnx_in.frozen_capacity import capacity_of, takes_any_number
from moeopt.onnx_in.frozen_choices import constant_columns, listed_hits, results_weighed_by, unread_choice
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.other_widths import other_widths
from moeopt.onnx_in.products import MOVING, WeightProduct, shape_of, weight_products
from moeopt.onnx_in.regions import CandidateRegion, region_name
from moeopt.onnx_in.tensors import constant_of
from moeopt.onnx_in.weighed_results import places_of_weights
from moeopt.value_types import OnnxNode, OnnxValue

WAY_OUT = (
    "export it again with a form of the experts that does not depend on the sample (all experts on all tokens; "
    "transformers: experts_implementation='batched_mm'), or optimise the PyTorch model with moeopt and export that"
)
BROKEN = "the file is broken"
"""How the reasons begin."""
_FAR = 16
"""Nodes between a choice and the scores that it is made by, and between an expert and its rows."""


def frozen_routing(candidate: CandidateRegion, others: Iterable[CandidateRegion] = ()) -> str:
    """Why the routing of a candidate looks frozen, a sentence for the file's owner; "" where it does not.

    ``others`` are candidates of the same graph: where one of them holds every expert that the router scores, a smaller
    number here is of experts that several of these share.
    """
    index = candidate.index
    for product in candidate.chains.products:
        node = _constant_rows(index, product)
        if node is not None:
            return (
                f"{BROKEN}: the node {node.name!r} ({node.op_type}) gives an expert the rows of the sample "
                f"that the model was traced with, as constants, whatever the input is; {WAY_OUT}"
            )
    shares = _shares(candidate)
    if len(set(shares.values())) > 1:
        node = next(iter(shares))[0]
        counts = ", ".join(str(n) for n in [*shares.values()][:4])
        return (
            f"{BROKEN}: the node {node.name!r} ({node.op_type}) gives its experts as many rows as they had in the "
            f"sample that the model was traced with ({counts}{', ...' if len(shares) > 4 else ''}), whatever the "
            f"router chooses; {WAY_OUT}"
        )
    place = listed_hits(index, candidate.chains.products)
    if place is not None:
        return (
            f"{BROKEN}: the node {place.name!r} ({place.op_type}) takes an expert from a constant place in the list of "
            "those that tokens chose, so that as many experts run as in the sample that the model was traced with, and "
            f"the file stops or loses tokens where others are chosen; {WAY_OUT}"
        )
    capacity = capacity_of(index, candidate.chains.products)
    if capacity is not None:
        return _capacity(index, *capacity)
    for region in candidate.regions[:1]:
        own = {p.at for p in candidate.chains.products}
        nodes = {id(node): node for node in (*region.nodes, *_before_rows(candidate))}
        choice, scored = _scored(index, list(nodes.values()), own)
        if scored > 1 and unread_choice(index, choice):
            assert choice is not None, "nothing else is scored"
            return unread(choice)
        count = candidate.chains.experts
        if columns := constant_columns(index, region.nodes, count):
            return f"{BROKEN}, {columns}; {WAY_OUT}"
        whole = (o for o in others if o.chains.experts == scored and any(choice in r.nodes for r in o.regions[:1]))
        if scored > count and (widths := other_widths(index, candidate.chains, scored)):
            return widths
        if scored > max(candidate.chains.written, count) and next(whole, None) is None:
            if merged := _computed_once(index, candidate.chains.products, scored):
                return merged
            return (
                f"{BROKEN}, unless some scores are meant for no expert (null experts), which a file does not "
                f"tell: its router scores {scored} experts, and the file holds {count}. An export that traces a loop "
                f"over the experts that are hit keeps those of its sample only, and tokens that choose another get "
                f"nothing; {WAY_OUT}"
            )
    return ""


def _computed_once(index: GraphIndex, products: Collection[WeightProduct], scored: int) -> str:
    """The reason where as many columns as are ``scored`` weigh fewer results, as equal experts are computed once."""
    weighed = {product.at: set(places_of_weights(index, product)) for product in products}
    if len(set[Hashable]().union(*weighed.values())) < scored:
        return ""
    node = index.nodes[max(weighed, key=lambda at: len(weighed[at]))]
    return (
        "some of its experts are equal, and the file computes these once: several columns of the router weigh what "
        f"the node {node.name!r} ({node.op_type}) gives, and moeopt reads one column for each expert; optimise the "
        "file from before a tool merged equal nodes (onnxslim, onnxsim), or the PyTorch model"
    )


def _capacity(index: GraphIndex, node: OnnxNode, rows: int) -> str:
    """The reason where an expert takes a constant number of the rows that chose this expert."""
    takes = (
        f"the node {node.name!r} ({node.op_type}) gives an expert a constant number of rows ({rows}), those that weigh "
        "most for this expert, and leaves out the others that chose it"
    )
    if not takes_any_number(index):
        return f"{takes}, so that a row's result depends on the other rows, and the op routes each row by itself"
    return (
        f"{BROKEN}, unless that number is the model's own, which a file does not tell: {takes}, and the file stops "
        "where there are fewer rows. An export that traces a capacity which the model computes keeps that of the "
        f"sample that the model was traced with; {WAY_OUT}"
    )


def unread(choice: OnnxNode) -> str:
    """The reason where nothing reads which experts a node chooses."""
    return (
        f"{BROKEN}, unless the same functions are meant whatever is chosen (a confidence that scales them, weights by "
        f"rank), which a file does not tell: nothing reads which experts the node {choice.name!r} ({choice.op_type}) "
        "chooses. An export that traces a loop over the experts that are hit keeps the choice of the sample that the "
        f"model was traced with, as constants; {WAY_OUT}"
    )


def lone_experts(index: GraphIndex, candidates: Collection[CandidateRegion]) -> Iterator[tuple[str, str]]:
    """The name and the reason of each expert that stands alone behind a frozen choice among several.

    ``candidates``: the regions of the same graph, which tell of their own choices.
    """
    products = weight_products(index)
    told = {id(node) for candidate in candidates for region in candidate.regions for node in region.nodes}
    for node in index.nodes:
        if node.op_type != "TopK" or id(node) in told or not unread_choice(index, node):
            continue
        choice, scored = _scored(index, _near(index, node), ())
        router = None if choice is None else _router(index, choice, products)
        product = results_weighed_by(index, node, products)
        if scored > 1 and product is not None and router is not None and product is not router:
            yield region_name([product]) or f"frozen_{index.at(node.outputs[0])}", unread(node)


def _near(index: GraphIndex, choice: OnnxNode) -> list[OnnxNode]:
    """A choice, and the nodes that its scores are made by."""
    found, value = [choice], choice.inputs[0]
    for _ in range(_FAR):
        made = None if value is None else value.producer()
        if made is None:
            break
        found.append(made)
        value = _data_input(index, made)
    return found


def _router(index: GraphIndex, choice: OnnxNode, products: dict[int, WeightProduct]) -> WeightProduct | None:
    """The product that gives a choice's scores."""
    return next((products[at] for at in (index.position[id(n)] for n in _near(index, choice)) if at in products), None)


def _constant_rows(index: GraphIndex, product: WeightProduct) -> OnnxNode | None:
    """The node that picks constant rows of a value that is none, for a product."""
    value = product.rows
    for _ in range(_FAR):
        node = value.producer()
        if node is None or index.at(value) < 0 or node.op_type not in MOVING or index.is_constant(value):
            return None
        if node.op_type in ("Gather", "GatherND", "GatherElements") and index.is_constant(node.inputs[1]):
            if _is_several(index, node.inputs[1]):
                return node
        value = node.inputs[0]
        if value is None:
            return None
    return None


def _shares(candidate: CandidateRegion) -> dict[tuple[Any, int], int]:
    """How many rows each expert is given, where rows that data choose are cut by constants; by node and output."""
    index = candidate.index
    found: dict[tuple[Any, int], int] = {}
    for product in candidate.chains.products:
        value, cut = product.rows, None
        for _ in range(_FAR):
            node = None if value is None else value.producer()
            if node is None or node.op_type not in MOVING or index.is_constant(value):
                break
            if node.op_type in ("Split", "Slice"):
                cut = cut or (node, list(node.outputs).index(value))
            elif node.op_type in ("Gather", "GatherND") and cut and not index.is_constant(node.inputs[1]):
                count = _rows_cut(*cut)
                if count is not None:
                    found[cut] = count
                break
            value = node.inputs[0]
    return found


def _rows_cut(node: OnnxNode, output: int) -> int | None:
    """How many rows a ``Split`` or a ``Slice`` of the first axis gives, by its constants; None where it has none."""
    if node.op_type == "Split":
        axis, held = node.attributes.get("axis"), _whole_numbers(node, 1)
        return held[output] if held and len(held) > output and (axis is None or axis.as_int() == 0) else None
    starts, ends, axes = (_whole_numbers(node, n) for n in (1, 2, 3))
    plain = starts and ends and len(starts) == len(ends) == 1 and axes in (None, [0])
    return ends[0] - starts[0] if plain and starts and ends and 0 <= starts[0] <= ends[0] < 1 << 31 else None


def _whole_numbers(node: OnnxNode, number: int) -> list[int] | None:
    """An input that is a constant, as numbers."""
    value = node.inputs[number] if len(node.inputs) > number else None
    made = None if value is None else value.producer()
    if made is not None and made.op_type == "Constant":
        return [int(n) for n in constant_of(made).reshape(-1)[:1024]]
    held = None if value is None else value.const_value
    return None if held is None else [int(n) for n in held.numpy().reshape(-1)[:1024]]


def _is_several(index: GraphIndex, value: OnnxValue) -> bool:
    """Whether a constant that may be computed of others is more than one number."""
    todo = [value]
    seen: set[int] = set()
    while todo and len(seen) < _FAR:
        here = todo.pop()
        shape = shape_of(here)
        if shape is not None and math.prod(shape) > 1:
            return True
        node = here.producer()
        if node is not None and id(here) not in seen:
            seen.add(id(here))
            todo += [v for v in node.inputs[:1] if v is not None]
    return False


def _before_rows(candidate: CandidateRegion) -> list[OnnxNode]:
    """What the first expert's rows are picked by, a few nodes back: a router that reads other values than the experts
    is no part of their region."""
    index, first = candidate.index, candidate.chains.products[0]
    found: dict[int, OnnxNode] = {}
    todo = [first.rows]
    while todo and len(found) < 4 * _FAR:
        value = todo.pop(0)
        node = None if value is None or index.is_constant(value) else value.producer()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            todo.extend(node.inputs)
    return list(found.values())


def _scored(index: GraphIndex, nodes: Sequence[OnnxNode], own: Collection[int]) -> tuple[OnnxNode | None, int]:
    """The choice among ``nodes``, and how many experts it is made of, as far as it tells; 0 where that is not to be
    seen.

    ``own``: where the experts' products are; a choice that is made by what they give scores no columns of these.
    """
    products = weight_products(index)
    inside = {id(node) for node in nodes}
    for node in nodes:
        if node.op_type not in ("TopK", "ArgMax"):
            continue
        value = node.inputs[0]
        for _ in range(_FAR):
            made = value.producer() if value is not None else None
            if made is None or id(made) not in inside:
                break
            product = products.get(index.at(value))
            if product is not None and product.at not in own:
                return node, columns_given(product)
            if product is not None or made.op_type in _OTHER_COUNT or made.op_type.startswith("Reduce"):
                break
            value = _data_input(index, made)
    return None, 0


def _data_input(index: GraphIndex, node: OnnxNode) -> OnnxValue:
    """The input that a node's result is a function of, constants left out."""
    return next((v for v in node.inputs if v is not None and not index.is_constant(v)), None)


_OTHER_COUNT = frozenset(("MatMul", "Einsum", "Split", "Slice", "Gather", "GatherElements", "GatherND", "Concat"))
"""Operators whose result has other columns than what it is made of: products of two values, cuts, joins."""

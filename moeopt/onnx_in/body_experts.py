"""Bodies of loops that run one expert a round, of one product: its matrix is that round's, and so is its weight.

    Loop(e)            y += table[:, e] * (x W[e])                  W (E, in, out), or where ids are e
    Scan(W_e, e)       the same, the scan taking the stack apart

Layers are none (a round reads what the one before gave), and neither are heads (nothing chosen weighs them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.products import PRODUCTS, shape_of, weight_products
from moeopt.onnx_in.weighed_results import CHOICES
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

_FAR = 64
"""Nodes before a factor, and behind a product."""


@dataclass(frozen=True)
class RoundOfExpert:
    """The product of a body, the constant that holds every round's matrix, and how many these are."""

    node: OnnxNode
    weight: OnnxValue
    experts: int


def round_of_expert(loop: OnnxNode, body: OnnxGraph) -> RoundOfExpert | None:
    """The expert that a round of a ``Loop`` or ``Scan`` runs; None where it runs none, or one of several products."""
    kept, rounds = _ends(loop, body)
    if not rounds:
        return None
    index = GraphIndex(body)
    found = [one for one in _of_rounds(loop, body, index) if not _reads(one[1], kept)]
    if len(found) != 1 or not found[0][0].experts > 1:
        return None
    one, _ = found[0]
    return one if _is_weighed(index, one.node, rounds) else None


def _ends(loop: OnnxNode, body: OnnxGraph) -> tuple[set[int], set[int]]:
    """What a round is given of the one before, and what tells the round."""
    given = [id(v) for v in body.inputs]
    if loop.op_type == "Loop":
        return set(given[2:]), set(given[:1])
    count = loop.attributes.get("num_scan_inputs") if loop.op_type == "Scan" else None
    state = len(given) - (count.as_int() if count is not None else len(given))
    return set(given[:state]), set(given[state:])


def _of_rounds(loop: OnnxNode, body: OnnxGraph, index: GraphIndex) -> Iterator[tuple[RoundOfExpert, OnnxValue]]:
    """The products by a matrix of a round, each with its rows."""
    for product in weight_products(index).values():
        if product.picked and product.of_stack:
            yield RoundOfExpert(product.node, product.weight, product.shape[0]), product.rows
    held = {id(v): w for v, w in zip(body.inputs, loop.inputs, strict=False) if loop.op_type == "Scan"}
    for node in body:
        sides = PRODUCTS.get((node.domain, node.op_type), ())
        for rows, weight in (sides, sides[::-1]) if sides and max(sides) < len(node.inputs) else ():
            stack = held.get(id(node.inputs[weight]))
            shape = None if stack is None else shape_of(stack)
            if shape is not None and len(shape) > 2 and node.inputs[rows] is not None:
                yield RoundOfExpert(node, stack, shape[0]), node.inputs[rows]


def _is_weighed(index: GraphIndex, product: OnnxNode, rounds: Collection[int]) -> bool:
    """Whether a round's own part of a choice multiplies what a product gives, or keeps rows of it."""
    todo, seen = [index.position[id(product)]], set[int]()
    while todo and len(seen) < _FAR:
        at = todo.pop(0)
        if at in seen:
            continue
        seen.add(at)
        for value in index.nodes[at].outputs:
            for reader in index.readers(value):
                node = index.nodes[reader]
                others = [v for v in node.inputs if v is not None and index.at(v) not in seen]
                if node.op_type in ("Mul", "Where") and any(_chosen(v, rounds) for v in others):
                    return True
                todo.append(reader)
    return False


def _chosen(value: OnnxValue, rounds: Collection[int]) -> bool:
    """Whether a value is made of a choice, in this graph or around it, and of what tells the round."""
    before = list(_before(value))
    ops = {node.op_type for node in before}
    return not ops.isdisjoint(CHOICES) and any(id(v) in rounds for node in before for v in node.inputs)


def _reads(value: OnnxValue, those: Collection[int]) -> bool:
    return id(value) in those or any(id(v) in those for node in _before(value) for v in node.inputs)


def _before(value: OnnxValue) -> Iterator[OnnxNode]:
    """The nodes near a value that it is made by, those around the body included."""
    todo, seen = [value], set[int]()
    while todo and len(seen) < _FAR:
        node = todo.pop(0).producer()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            todo += [v for v in node.inputs if v is not None]
            yield node

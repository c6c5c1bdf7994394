"""What of a file may be experts and is not looked into: blocks that are one operator already, and blocks in bodies."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from moeopt.onnx_in.body_experts import round_of_expert
from moeopt.onnx_in.chains import expert_chains
from moeopt.onnx_in.frozen_routing import lone_experts
from moeopt.onnx_in.idle_branches import why_not_taken
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.operators.table import shown
from moeopt.onnx_in.products import WHOLE, WeightProduct, weight_products
from moeopt.onnx_in.regions import CandidateRegion, candidate_regions, region_name
from moeopt.onnx_in.weighed_results import weighed_results
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

_IN_A_BODY = (
    "it stands in a body of the node {}, and moeopt replaces blocks of the main graph: export the model without that "
    "loop or branch, or optimise the PyTorch model first (a loop is written out where its number of rounds is a "
    "constant and its condition stays true, a branch where its condition is a constant)"
)
_FAR = 64
"""Nodes between a choice and a condition that is computed of it."""


@dataclass(frozen=True)
class LeftAlone:
    """A block that is left as it is: its name, why, and how many experts it has (None where that is not to be seen)."""

    name: str
    reason: str
    experts: int | None


def left_alone(graph: OnnxGraph) -> Iterator[LeftAlone]:
    """Every such block of a graph and of the bodies in it, in order."""
    names: set[str] = set()
    for node, place, body in _bodies(graph):
        for one in body:
            if (one.domain, one.op_type) in WHOLE:
                yield _whole(one)
        yield from _in_branches(body)
        if node is None and not any(one.op_type == "TopK" and not one.outputs[-1].uses() for one in body):
            continue  # another search of the main graph, for which there is no reason
        index = GraphIndex(body)
        candidates = list(candidate_regions(index))
        yield from (LeftAlone(name, reason, 1) for name, reason in lone_experts(index, candidates))
        if node is None:
            continue
        alone = round_of_expert(node, body)
        found = [(candidate.name, candidate.chains.experts) for candidate in candidates]
        if alone is not None and not found:
            product = WeightProduct(0, alone.node, alone.weight, alone.weight, (), False)
            found = [(region_name([product]) or "experts", alone.experts)]
        for inner, experts in found:
            name = f"{node.name or node.op_type}.{inner}"
            if name in names:  # in the other branch
                name = f"{node.name or node.op_type}.{place}.{inner}"
            names.add(name)
            label = repr(node.name) if node.name else f"that gives {node.outputs[0].name!r}"
            yield LeftAlone(name, _IN_A_BODY.format(f"{label} ({node.op_type})"), experts)


def no_pairs(graph: OnnxGraph, candidates: Sequence[CandidateRegion], told: Collection[int | None]) -> list[LeftAlone]:
    """The mixtures of a graph whose experts are no products that a region is cut around.

    Args:
        candidates: the regions that have entries.
        told: how many experts other entries have; as many are taken for the same mixture.
    """
    known = {id(node) for candidate in candidates for region in candidate.regions for node in region.nodes}
    known |= {id(product.node) for candidate in candidates for product in candidate.chains.products}
    told = {*told, *(candidate.chains.experts for candidate in candidates if not candidate.regions)}
    return [
        LeftAlone(
            region_name(found.weights) or f"weighed_{found.at}",
            f"each of its {found.experts} experts has {found.operators} with constants of its own, and blocks are cut "
            "out of a file around products of the same rows by one matrix for each expert, or two such with an "
            "element-wise function between, which these are not; they stay as they are",
            found.experts,
        )
        for found in weighed_results(GraphIndex(graph), known)
        if found.experts not in told
    ]


def _whole(node: OnnxNode) -> LeftAlone:
    weight = node.inputs[2] if len(node.inputs) > 2 else None
    experts = None if weight is None or weight.shape is None or not len(weight.shape) else weight.shape[0]
    return LeftAlone(
        (node.name or node.op_type).strip("/").replace("/", "."),
        f"the node {node.name!r} is {shown(node.domain, node.op_type)}: one operator for all experts, "
        "which runs no expert that is not chosen; it is left as it is",
        experts if isinstance(experts, int) else None,
    )


def _in_branches(graph: OnnxGraph) -> Iterator[LeftAlone]:
    """Blocks each of whose experts stands in an ``If`` of its own, which asks whether a token chose it."""
    experts: dict[Hashable, list[tuple[OnnxNode, WeightProduct]]] = {}
    for node in graph:
        choice = _choice_behind(node.inputs[0]) if node.op_type == "If" else None
        found: set[Hashable] = set()
        for _, body in _held(node) if choice is not None else ():
            index = GraphIndex(body)
            products = weight_products(index)
            chains = [chain.pairs[0] for chain in expert_chains(index, products) if chain.experts == 1]
            alone = [(product, product) for product in products.values()] if len(products) == 1 else []
            for chain in chains or alone:
                key = id(choice), tuple((p.shape, p.node.op_type) for p in chain)
                if key not in found:
                    found.add(key)
                    experts.setdefault(key, []).append((node, chain[0]))
    for number, several in enumerate(experts.values()):
        if len(several) > 1:
            names = " and ".join(repr(node.name) for node, _ in several[:2])
            yield LeftAlone(
                region_name([product for _, product in several]) or f"branches_{number}",
                f"each of its experts stands in a branch of its own, like those of the nodes {names} (If), and moeopt "
                f"replaces blocks of the main graph: {why_not_taken(several[0][0])}. Export the model without those "
                "branches (all experts on all tokens, or rows that are gathered), or optimise the PyTorch model first",
                len(several),
            )


def _choice_behind(value: OnnxValue) -> OnnxNode | None:
    """The nearest node that picks among scores and that a condition is computed of; None where none is near."""
    todo, seen = [value], set[int]()
    while todo and len(seen) < _FAR:
        node = todo.pop(0).producer()
        if node is None or id(node) in seen:
            continue
        if node.op_type in ("TopK", "ArgMax"):
            return node
        seen.add(id(node))
        todo += [v for v in node.inputs if v is not None]
    return None


def _bodies(
    graph: OnnxGraph, node: OnnxNode | None = None, place: str = ""
) -> Iterator[tuple[OnnxNode | None, str, OnnxGraph]]:
    """A graph with the node that it is a body of (None for the main one) and the body's name, and the bodies in it."""
    yield node, place, graph
    for one in graph:
        for name, body in _held(one):
            yield from _bodies(body, one, name)


def _held(node: OnnxNode) -> Iterator[tuple[str, OnnxGraph]]:
    """The bodies of a node, each with the name of the attribute that it is."""
    import onnx_ir as ir

    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((f"{name}.{number}", body) for number, body in enumerate(attribute.value))

"""What of a file may be experts and is not looked into: blocks that are one operator already, and blocks in bodies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.operators.table import shown
from moeopt.onnx_in.products import WHOLE
from moeopt.onnx_in.regions import candidate_regions
from moeopt.value_types import OnnxGraph, OnnxNode


@dataclass(frozen=True)
class LeftAlone:
    """A block that is left as it is: its name, why, and how many experts it has (None where that is not to be seen)."""

    name: str
    reason: str
    experts: int | None


def left_alone(graph: OnnxGraph) -> Iterator[LeftAlone]:
    """Every such block of a graph and of the bodies in it, in order."""
    for node, body in _bodies(graph):
        for one in body:
            if (one.domain, one.op_type) in WHOLE:
                yield _whole(one)
        if node is None:
            continue
        for candidate in candidate_regions(GraphIndex(body)):
            yield LeftAlone(
                f"{node.name or node.op_type}.{candidate.name}",
                f"it stands in a body of the node {node.name!r} ({node.op_type}), and moeopt replaces blocks of the "
                "main graph: export the model without that loop or branch, or optimise the PyTorch model first "
                "(a loop is written out where its number of rounds is a constant and its condition stays true, a "
                "branch where its condition is a constant)",
                candidate.chains.experts,
            )


def _whole(node: OnnxNode) -> LeftAlone:
    weight = node.inputs[2] if len(node.inputs) > 2 else None
    experts = None if weight is None or weight.shape is None or not len(weight.shape) else weight.shape[0]
    return LeftAlone(
        (node.name or node.op_type).strip("/").replace("/", "."),
        f"the node {node.name!r} is {shown(node.domain, node.op_type)}: one operator for all experts, "
        "which runs no expert that is not chosen; it is left as it is",
        experts if isinstance(experts, int) else None,
    )


def _bodies(graph: OnnxGraph, node: OnnxNode = None) -> Iterator[tuple[OnnxNode, OnnxGraph]]:
    """A graph with the node that it is a body of (None for the main one), and the bodies in it."""
    import onnx_ir as ir

    yield node, graph
    for one in graph:
        for attribute in one.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _bodies(attribute.value, one)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.value:
                    yield from _bodies(body, one)

"""An ``fx.Graph`` as plain values and back, since pickle takes neither graphs nor op overloads.

A node becomes (op, name, target, args, kwargs, meta), a reference to a node its number, an op its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeopt.value_types import FxTarget, PyObject

Words = list[tuple[str, str, Any, Any, Any, dict[str, Any]]]


@dataclass(frozen=True)
class OpName:
    """An OpOverload by name."""

    name: str
    overload: str

    @staticmethod
    def of(target: FxTarget) -> PyObject:
        """The name of ``target`` where that is an OpOverload, else ``target``."""
        if not isinstance(target, torch._ops.OpOverload):
            return target
        return OpName(target._schema.name, target._overloadname)

    def op(self) -> PyObject:
        """The op of this name."""
        space, _, name = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, space), name), self.overload)


@dataclass(frozen=True)
class NodeNumber:
    """A node by its place in the graph."""

    number: int


def graph_to_words(graph: fx.Graph) -> Words:
    """``graph`` as plain values."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def plain(tree: PyObject) -> PyObject:
        return fx.node.map_aggregate(tree, refer)

    def refer(leaf: PyObject) -> PyObject:
        return NodeNumber(number[leaf]) if isinstance(leaf, fx.Node) else leaf

    return [(n.op, n.name, OpName.of(n.target), plain(n.args), plain(n.kwargs), dict(n.meta)) for n in graph.nodes]


def graph_from_words(words: Words) -> fx.Graph:
    """The inverse of :func:`graph_to_words`."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def whole(tree: PyObject) -> PyObject:
        return fx.node.map_aggregate(tree, lambda leaf: nodes[leaf.number] if isinstance(leaf, NodeNumber) else leaf)

    for op, name, target, args, kwargs, meta in words:
        target = target.op() if isinstance(target, OpName) else target
        nodes.append(graph.create_node(op, target, whole(args), whole(kwargs), name))
        nodes[-1].meta = meta
    return graph

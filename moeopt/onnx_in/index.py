"""A graph's nodes by position, and what each value is made of and read by; every question takes constant time.

Values of an outer graph, which a body reads, have no producer here and count as inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
)
"""Operators whose result is no constant, whatever they read."""

MEASURES = ("Shape", "Size")
ON_SIZES = frozenset(
    ("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze")
    + ("Reshape", "ReduceProd", "Split", "Cast", "Identity")
)
"""Operators that an exporter computes shapes with."""


class GraphIndex:
    """One graph, or one body, read once.

    Attributes:
        nodes: in topological order.
        position: of a node, by its identity.
        visited: how many nodes all questions so far have looked at, for tests of how the search grows.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.nodes: list[Any] = list(graph)
        self.position = {id(node): number for number, node in enumerate(self.nodes)}
        self.visited = len(self.nodes)
        self.products: dict[int, Any] | None = None  # what products.weight_products found, once
        self._reads: dict[int, list[Any]] = {}
        self._readers: dict[int, list[int]] = {}
        self._given = {id(v) for v in graph.inputs}
        self._fixed: set[int] = set()
        self._sizes: set[int] = set()
        self._fills: set[int] = set()
        self.ends = {id(v) for v in graph.outputs}
        for node in self.nodes:
            reads = [v for v in node.inputs if v is not None]
            bodies = False
            for attribute in node.attributes.values():
                inner = list(captured(attribute))
                reads += inner
                bodies = bodies or bool(inner)
            self._reads[id(node)] = reads
            for key in {id(v) for v in reads}:
                self._readers.setdefault(key, []).append(self.position[id(node)])
            if not bodies and node.op_type not in RANDOM and all(self.is_constant(v) for v in reads):
                self._fixed |= {id(v) for v in node.outputs}
            elif not bodies and node.op_type not in RANDOM:
                self._made_of_sizes(node, reads)

    def is_constant(self, value: OnnxValue) -> bool:
        """Whether a value is an initializer that no caller can replace, or computed of such alone."""
        if id(value) in self._fixed:
            return True
        return value.const_value is not None and id(value) not in self._given and not value.is_graph_input()

    def _made_of_sizes(self, node: OnnxNode, reads: list[Any]) -> None:
        results = {id(v) for v in node.outputs}
        on_sizes = node.op_type in ON_SIZES and all(self.is_constant(v) or id(v) in self._sizes for v in reads)
        if on_sizes or node.op_type in MEASURES:
            self._sizes |= results
        elif all(self.is_constant(v) or id(v) in self._sizes or id(v) in self._fills for v in reads):
            self._fills |= results

    def is_size(self, value: OnnxValue) -> bool:
        """Whether a value is whole numbers that are computed of the sizes of others alone, and of constants."""
        return id(value) in self._sizes

    def is_fill(self, value: OnnxValue) -> bool:
        """Whether a value is data that are made of sizes alone: zeros to add to, positions to count with."""
        return id(value) in self._fills

    def reads(self, node: OnnxNode) -> list[Any]:
        """The values that a node or one of its bodies reads."""
        return self._reads[id(node)]

    def at(self, value: OnnxValue) -> int:
        """The position of the node of this graph that makes a value; -1 where none does."""
        node = value.producer()
        return -1 if node is None else self.position.get(id(node), -1)

    def readers(self, value: OnnxValue) -> list[int]:
        """The positions of this graph's nodes that read a value, in order; for a body's, of what holds it."""
        return self._readers.get(id(value), [])


def captured(attribute: OnnxValue) -> Iterator[Any]:
    """The values of outer graphs that an attribute's graphs read."""
    import onnx_ir as ir

    if attribute.type == ir.AttributeType.GRAPH:
        graphs = [attribute.value]
    elif attribute.type == ir.AttributeType.GRAPHS:
        graphs = list(attribute.value)
    else:
        return
    for graph in graphs:
        own: set[int] = {id(v) for v in graph.inputs} | {id(v) for v in graph.initializers.values()}
        for node in graph:
            for value in (*node.inputs, *(v for a in node.attributes.values() for v in captured(a))):
                if value is not None and id(value) not in own:
                    yield value
            own |= {id(v) for v in node.outputs}
        yield from (v for v in graph.outputs if id(v) not in own)

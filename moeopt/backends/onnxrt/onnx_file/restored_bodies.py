"""Loops and branches that were written out for nothing stand in the new graph as they stood in the file.

Bodies with experts are written out on a copy of the file, and blocks are replaced in the copy. Where none of what a
node's body became is part of a block that was replaced, that is the node again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moeopt.onnx_in.order import reads
from moeopt.onnx_in.unroll import rename
from moeopt.value_types import OnnxGraph, OnnxNode


def with_bodies_restored(
    nodes: Sequence[OnnxNode], graph: OnnxGraph, inside: Collection[int], written: Mapping[str, OnnxNode]
) -> list[OnnxNode]:
    """The ``nodes`` of a new graph, each node of the file whose body was written out again in place of what it became.

    Args:
        graph: the copy of the file, its bodies written out. inside: positions in it of the nodes that were replaced.
        written: by value that such a body became, the node of the file.
    """

    def origin(node: OnnxNode) -> OnnxNode:
        return _origin(node, written)

    results = _results(graph, written)
    ends = set(results.values())
    taken = {id(origin(node)) for node in (graph.node[number] for number in inside) if ends.isdisjoint(node.output)}
    for node in nodes:
        here = origin(node)
        homes = ((written[name], name) for name in reads(node) if name in written and name not in results)
        taken |= {id(home) for home, name in homes if home is not here and name not in home.output}
    taken |= _without_what_they_read(nodes, graph, written, taken)
    last = {id(home): number for number, node in enumerate(nodes) if (home := origin(node)) is not None}
    made: list[OnnxNode] = []
    for number, node in enumerate(nodes):
        home = origin(node)
        if home is None or id(home) in taken:
            rename(node, {name: end for name, end in results.items() if id(written[name]) not in taken})
            made.append(node)
        elif number == last[id(home)]:
            made.append(home)
    return _read_nodes(made, graph, written)


def _without_what_they_read(
    nodes: Sequence[OnnxNode], graph: OnnxGraph, written: Mapping[str, OnnxNode], taken: Collection[int]
) -> set[int]:
    """Which other nodes of the file read what nobody gives any more: a branch that is never taken may read what stood
    within a block that was replaced, and is then left out, as it was on the copy."""
    homes = {id(home): home for home in written.values() if id(home) not in taken}
    known = {v.name for v in (*graph.input, *graph.initializer)}
    known |= {v.values.name for v in graph.sparse_initializer}
    known |= {name for node in nodes for name in node.output}
    lost: set[int] = set()
    while True:  # a node that stays written out may have given another one its result
        given = known.union(*(home.output for key, home in homes.items() if key not in lost))
        more = {key for key, home in homes.items() if key not in lost and not given.issuperset(reads(home))}
        if not more:
            return lost
        lost |= more


def _origin(node: OnnxNode, written: Mapping[str, OnnxNode]) -> OnnxNode:
    return next((written[name] for name in node.output if name in written), None)


def _results(graph: OnnxGraph, written: Mapping[str, OnnxNode]) -> dict[str, str]:
    """The results of the nodes that were written out, by the inner value that each is."""
    found: dict[str, str] = {}
    for node in graph.node:
        home = _origin(node, written) if node.op_type == "Identity" else None
        if home is not None and node.output[0] in home.output and written.get(node.input[0]) is home:
            found[node.input[0]] = node.output[0]
    return found


def _read_nodes(nodes: Sequence[OnnxNode], graph: OnnxGraph, written: Mapping[str, OnnxNode]) -> list[OnnxNode]:
    """The nodes without what rounds of a body gave to nobody."""
    needed, kept = {v.name for v in graph.output}, list[OnnxNode]()
    for node in reversed(nodes):
        if _origin(node, written) is None or not needed.isdisjoint(node.output):
            kept.append(node)
            needed |= set(reads(node))
    return kept[::-1]

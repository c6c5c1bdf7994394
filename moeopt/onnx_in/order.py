"""Nodes in an order in which each reads what is there already, as ONNX asks and some converters forget.

ONNX Runtime puts nodes in order itself, so such files run, and are common: the usual converter to float16 appends its
casts at the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

from moeopt.value_types import OnnxGraph, OnnxModel, OnnxNode


def reads(node: OnnxNode) -> Iterator[str]:
    """The names that a protobuf node or one of its bodies reads."""
    yield from (name for name in node.input if name)
    for body in bodies(node):
        own = {v.name for v in (*body.input, *body.initializer)} | {o for n in body.node for o in n.output}
        names = {name for n in body.node for name in reads(n)} | {v.name for v in body.output}
        yield from names - own


def bodies(node: OnnxNode) -> list[Any]:
    """The graphs that a protobuf node holds."""
    return [
        body
        for attribute in node.attribute
        for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    ]


def in_order(proto: OnnxModel) -> OnnxModel:
    """The model itself, or a copy with the nodes of its graph, its functions and the bodies in them in order.

    Nodes keep the order that they have where that is possible. What a cycle holds stays where it is.
    """
    if not any(_out_of_order(part) for part in (proto.graph, *proto.functions)):
        return proto
    made = type(proto)()
    made.CopyFrom(proto)
    for part in (made.graph, *made.functions):
        _sort(part)
    return made


def _out_of_order(graph: OnnxGraph) -> bool:
    return _order(graph) != list(range(len(graph.node))) or any(
        _out_of_order(body) for node in graph.node for body in bodies(node)
    )


def _sort(graph: OnnxGraph) -> None:
    held = type(graph)(node=[graph.node[number] for number in _order(graph)])  # copies, before the originals go
    del graph.node[:]
    graph.node.MergeFrom(held.node)
    for node in graph.node:
        for body in bodies(node):
            _sort(body)


def _order(graph: OnnxGraph) -> list[int]:
    """The positions of the nodes, the first that may come first; those of a cycle last."""
    makers: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in node.output:
            makers.setdefault(name, number)
    readers: dict[int, list[int]] = {}
    waits: list[int] = []
    for number, node in enumerate(graph.node):
        needed = {makers[name] for name in reads(node) if name in makers}
        waits.append(len(needed))
        for maker in needed:
            readers.setdefault(maker, []).append(number)
    ready = [number for number, count in enumerate(waits) if not count]
    found: list[int] = []
    while ready:
        number = heapq.heappop(ready)
        found.append(number)
        for reader in readers.get(number, ()):
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    return found + [number for number, count in enumerate(waits) if count]

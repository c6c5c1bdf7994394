"""Every ``Loop`` of a graph and of the bodies in it, and what the file says of how often each runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeopt.onnx_in.order import bodies
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

Number = Callable[[str], "int | None"]


@dataclass(frozen=True, eq=False)
class FoundLoop:
    """A loop.

    Attributes:
        name: of its node.
        around: the loops that it stands in, the outermost first.
        most: the constant that its rounds are no more than; None where there is none.
        has_most: whether it is given such a number at all: a constant, or what data say.
        begins: whether its condition is true before the first round, as a constant.
        goes_on: whether its condition is what it was before, after every round, or a constant that is true.
    """

    name: str
    body: OnnxGraph
    around: tuple[FoundLoop, ...]
    most: int | None
    has_most: bool
    begins: bool
    goes_on: bool


def loops_of(graph: OnnxGraph) -> Iterator[FoundLoop]:
    """Every loop, each before those in it."""
    yield from _within(graph, {}, ())


def _within(graph: OnnxGraph, outer: Mapping[str, Any], around: tuple[FoundLoop, ...]) -> Iterator[FoundLoop]:
    held = {**outer, **held_constants(graph)}

    def number(name: str) -> int | None:
        return whole_number(held[name]) if name in held else None

    for node in graph.node:
        inner = around
        loop = _loop(node, around, number)
        if loop is not None:
            inner = (*around, loop)
            yield loop
        for body in bodies(node):
            yield from _within(body, held, inner)


def _loop(node: OnnxNode, around: tuple[FoundLoop, ...], number: Number) -> FoundLoop | None:
    body = next((b for b in bodies(node) if b.output and b.input), None)
    if node.op_type != "Loop" or node.domain not in ("", "ai.onnx") or len(node.input) < 2 or body is None:
        return None
    most, condition = node.input[:2]
    return FoundLoop(
        node.name or node.op_type, body, around, number(most) if most else None, bool(most),
        not condition or number(condition) == 1, never_stops(body, number),
    )  # fmt: skip


def whole_number(tensor: OnnxValue) -> int | None:
    """A constant that is one whole number or flag; None for any other."""
    import onnx

    if tensor is None or math.prod(tensor.dims) != 1 or tensor.data_type not in (6, 7, 9) or tensor.data_location:
        return None
    return int(onnx.numpy_helper.to_array(tensor).item())


def held_constants(graph: OnnxGraph) -> dict[str, Any]:
    """The tensors of a graph that no caller replaces, by name."""
    inputs = {v.name for v in graph.input}
    return {t.name: t for t in graph.initializer if t.name not in inputs} | {
        n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
    }


def never_stops(body: OnnxGraph, number: Number) -> bool:
    """Whether a loop's condition is true after every round: what it was given, or a constant.

    Args:
        number: of a name around the body, the whole number that it is, or None.
    """
    made = {name: node for node in body.node for name in node.output}
    value = body.output[0].name
    while value in made and made[value].op_type == "Identity":
        value = made[value].input[0]
    if len(body.input) > 1 and value == body.input[1].name:
        return True
    held = held_constants(body)
    return (whole_number(held[value]) if value in held else number(value)) == 1

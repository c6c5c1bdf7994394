"""Loops of a stranger's file that nothing ends: as many rounds as no machine runs, and no condition that stops them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from moeopt.errors import UsageError
from moeopt.onnx_in.order import bodies
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

MOST_ROUNDS = 1 << 24
"""Of a loop whose condition stays true, the rounds of the loops around it included."""

Number = Callable[[str], "int | None"]


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


def check_loops(where: str, graph: OnnxGraph) -> None:
    """``UsageError`` for a loop, here or in a body, that never ends."""
    _check(where, graph, {}, 1)


def _check(where: str, graph: OnnxGraph, outer: Mapping[str, Any], around: int) -> None:
    held = {**outer, **held_constants(graph)}

    def number(name: str) -> int | None:
        return whole_number(held[name]) if name in held else None

    for node in graph.node:
        rounds = around
        if node.op_type == "Loop" and node.domain in ("", "ai.onnx") and len(node.input) >= 2:
            rounds = around * _rounds(node, number)
            if rounds > MOST_ROUNDS:
                raise UsageError(
                    f"{where}: the node {shown_line(node.name or node.op_type)!r} (Loop) runs its body more than "
                    f"{MOST_ROUNDS} times, and no condition stops it: it was damaged, or made to hang who runs it"
                )
        for body in bodies(node):
            _check(where, body, held, rounds)


def _rounds(node: OnnxNode, number: Number) -> int:
    """How often a loop runs for certain; 1 where data say."""
    body = next((b for b in bodies(node) if b.output), None)
    if body is None or (node.input[1] and number(node.input[1]) != 1) or not never_stops(body, number):
        return 1
    trips = number(node.input[0]) if node.input[0] else MOST_ROUNDS + 1
    return 1 if trips is None else max(trips, 1)

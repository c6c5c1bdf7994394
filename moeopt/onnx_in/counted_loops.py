"""Loops whose number of rounds data decide, with a bound: a file that never ends on some inputs hangs nobody.

    again = cond(...)        ->        again = cond(...) and one[e / N] == 1        e: the round

The lookup has one place, so that the runtime stops at round N. Nothing else of a loop changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeopt.onnx_in.endless import held_constants, never_stops, whole_number
from moeopt.onnx_in.free_names import FreeNames, names_in
from moeopt.onnx_in.order import bodies
from moeopt.value_types import OnnxGraph, OnnxModel

ROUNDS = 1 << 18
"""Of a loop that stands in no other, and holds none."""
_ALL_ROUNDS = 1 << 22
"""Of loops within loops, together."""
_GUARD = "moeopt.round"


def with_counted_rounds(proto: OnnxModel) -> tuple[OnnxModel, dict[str, tuple[str, int]]]:
    """A copy of a file whose loops stop with an error after so many rounds, and for the name of each node that stops
    one that loop's own and its rounds; the same file where it has none whose rounds data decide."""
    if not any(loop.by_data for loop in _loops(proto.graph, {}, ())):
        return proto, {}
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    free = FreeNames(names_in(made.graph))
    guards: dict[str, tuple[str, int]] = {}
    loops = list(_loops(made.graph, {}, ()))
    for loop in (one for one in loops if one.by_data):
        nests = [(*other.around, other) for other in loops if loop in (*other.around, other)]
        rounds = min(_rounds(nest) for nest in nests)
        guards[_guard(loop.body, rounds, free)] = (loop.name, rounds)
    return made, guards


@dataclass(frozen=True, eq=False)
class _Loop:
    """A loop, those that it stands in, and how often it runs; 0 where data decide."""

    name: str
    body: OnnxGraph
    around: tuple[_Loop, ...]
    trips: int

    @property
    def by_data(self) -> bool:
        return self.trips == 0


def _rounds(nest: Sequence[_Loop]) -> int:
    """How many rounds each loop of a nest whose rounds data decide may run, so that all of them end soon."""
    by_data = sum(loop.by_data for loop in nest)
    rest = _ALL_ROUNDS / math.prod(loop.trips or 1 for loop in nest)
    return min(ROUNDS, max(2, int(rest ** (1 / by_data))))


def _loops(graph: OnnxGraph, outer: Mapping[str, Any], around: tuple[_Loop, ...]) -> Iterator[_Loop]:
    """Every loop of a graph and of the bodies in it, each before those in it."""
    held = {**outer, **held_constants(graph)}

    def number(name: str) -> int | None:
        return whole_number(held[name]) if name in held else None

    for node in graph.node:
        inner = around
        body = next((b for b in bodies(node) if b.output and b.input), None)
        if node.op_type == "Loop" and node.domain in ("", "ai.onnx") and len(node.input) > 1 and body is not None:
            trips = number(node.input[0]) if node.input[0] else None
            certain = trips is not None and (trips <= ROUNDS or never_stops(body, number))
            inner = (*around, _Loop(node.name or node.op_type, body, around, max(1, trips or 1) if certain else 0))
            yield inner[-1]
        for one in bodies(node):
            yield from _loops(one, held, inner)


def _guard(body: OnnxGraph, rounds: int, free: FreeNames) -> str:
    """Add to a loop's body what stops it; the name of the node that does."""
    import onnx

    helper, held = onnx.helper, onnx.numpy_helper.from_array
    most, one, place, found, goes, again = (free.new(f"{_GUARD}.{part}") for part in _PARTS)
    body.initializer.append(held(np.array(rounds, dtype=np.int64), most))
    body.initializer.append(held(np.ones(1, dtype=np.int64), one))
    body.node.extend(
        (
            helper.make_node("Div", [body.input[0].name, most], [place], place),
            helper.make_node("Gather", [one, place], [found], found, axis=0),
            helper.make_node("Cast", [found], [goes], goes, to=onnx.TensorProto.BOOL),
            helper.make_node("And", [body.output[0].name, goes], [again], again),
        )
    )
    body.output[0].name = again
    return found


_PARTS = ("most", "one", "place", "found", "goes", "again")

"""Loops whose number of rounds data decide, with a bound: a file that never ends on some inputs hangs nobody.

    again = cond(...)        ->        again = cond(...) and one[e / N] == 1        e: the round

The lookup has one place, so that the runtime stops at round N. Nothing else of a loop changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moeopt.onnx_in.free_names import FreeNames, names_in
from moeopt.onnx_in.loops import FoundLoop, loops_of
from moeopt.value_types import OnnxGraph, OnnxModel

ROUNDS = 1 << 18
"""Of a loop that stands in no other, and holds none."""
_ALL_ROUNDS = 1 << 22
"""Of loops within loops, together."""
_GUARD = "moeopt.round"


def with_counted_rounds(proto: OnnxModel) -> tuple[OnnxModel, dict[str, tuple[str, int]]]:
    """A copy of a file whose loops stop with an error after so many rounds, and for the name of each node that stops
    one that loop's own and its rounds; the same file where it has none whose rounds data decide."""
    if all(map(_trips, loops_of(proto.graph))):
        return proto, {}
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    free = FreeNames(names_in(made.graph))
    guards: dict[str, tuple[str, int]] = {}
    loops = list(loops_of(made.graph))
    for loop in (one for one in loops if not _trips(one)):
        nests = [(*other.around, other) for other in loops if loop in (*other.around, other)]
        rounds = min(_rounds(nest) for nest in nests)
        guards[_guard(loop.body, rounds, free)] = (loop.name, rounds)
    return made, guards


def _trips(loop: FoundLoop) -> int:
    """How often a loop runs; 0 where data decide."""
    certain = loop.most is not None and (loop.most <= ROUNDS or loop.goes_on)
    return max(1, loop.most or 1) if certain else 0


def _rounds(nest: Sequence[FoundLoop]) -> int:
    """How many rounds each loop of a nest whose rounds data decide may run, so that all of them end soon."""
    trips = [_trips(loop) for loop in nest]
    rest = _ALL_ROUNDS / math.prod(n or 1 for n in trips)
    return min(ROUNDS, max(2, int(rest ** (1 / trips.count(0)))))


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

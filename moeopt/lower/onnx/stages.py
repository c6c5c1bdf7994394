"""Which part of a recurrent step has to run token by token, and which can run for all tokens at once.

A step is a function of one token and of states. A node belongs to the loop of a state only if it both reads that state
and decides its next value; everything else is the same for a batch of B rows with S tokens as for a batch of B S rows
with one. States that do not read each other (the window of a convolution, and what is made of its result) have loops of
their own, one after the other.

Shape legend: B rows. A value of the step is (B, ...); what follows B is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

ROWS, CONSTANT, SIZES = "rows", ("constant", 0), ("sizes", 0)
WIDEST = 4
"""What goes in or out of a loop is at most so many times as wide as the widest product. States are wider: one of them
for each token would fill the memory."""

StagePosition = tuple[str, int]
"""``("loop", k)``; ``(ROWS, k)``: for all tokens, after loop k, or before any for k = -1; CONSTANT: of no token;
SIZES: it says how many rows there are, which differs from place to place."""


@dataclass
class Stages:
    """Where each node of a step runs.

    Attributes:
        loops: the states (numbers) of each loop, in order.
        places: by ``id(node)``.
        homes: of each value that a token or a state makes, by ``id(value)``: the place where it is made.
    """

    loops: list[list[int]]
    places: dict[int, StagePosition] = field(default_factory=dict)
    homes: dict[int, StagePosition] = field(default_factory=dict)


def plan_stages(graph: OnnxGraph, tokens: Sequence[Any], states: Sequence[Any], results: Sequence[Any]) -> Stages:
    """Stages of an ``onnx_ir.Graph`` whose inputs are ``tokens`` and ``states`` and whose next states are last."""
    nexts = list(graph.outputs)[-len(states) :]
    reads = _reads(graph, {id(value): 1 << n for n, value in enumerate(states)})
    loops = _loops([reads.get(id(value), 0) | 1 << n for n, value in enumerate(nexts)])
    loop_of = {n: k for k, members in enumerate(loops) for n in members}
    feeds = _feeds(graph, [(value, loop_of[n]) for n, value in enumerate(nexts)])
    stages = Stages(loops)
    for value in tokens:
        stages.homes[id(value)] = (ROWS, -1)
    for n, value in enumerate(states):
        stages.homes[id(value)] = ("loop", loop_of[n])
    for node in graph:
        kinds = {stages.homes.get(id(v), CONSTANT) for v in node.inputs if v is not None}
        if node.op_type == "Shape" and not node.domain and kinds != {CONSTANT}:
            place = SIZES
        elif kinds <= {CONSTANT, SIZES}:
            place = SIZES if SIZES in kinds else CONSTANT
        else:
            latest = max([loop_of[n] for n in range(len(states)) if reads[id(node.outputs[0])] >> n & 1], default=-1)
            held = latest >= 0 and any(feeds.get(id(v), 0) >> latest & 1 for v in node.outputs)
            place = ("loop" if held else ROWS, latest)
        stages.places[id(node)] = place
        stages.homes.update({id(value): place for value in node.outputs})
    doors = _Doors(graph, states[0].shape[0], tokens, results)
    return stages if _settle(graph, stages, results, doors) else one_loop(graph, tokens, states)


def _loops(reads: list[int]) -> list[list[int]]:
    """States that depend on one another go through one loop: ``reads[n]`` has a bit for each state that n reads."""
    closure = reads
    for _ in reads:
        closure = [_union(c, closure) for c in closure]
    loops: list[list[int]] = []
    for n in sorted(range(len(reads)), key=lambda n: (closure[n].bit_count(), closure[n])):
        if loops and closure[loops[-1][0]] == closure[n]:
            loops[-1].append(n)
        else:
            loops.append([n])
    return loops


def one_loop(graph: OnnxGraph, tokens: Sequence[Any], states: Sequence[Any]) -> Stages:
    """Everything token by token."""
    stages = Stages([list(range(len(states)))])
    stages.homes = {id(value): (ROWS, -1) for value in tokens} | {id(value): ("loop", 0) for value in states}
    for node in graph:
        stages.places[id(node)] = ("loop", 0)
        stages.homes |= {id(value): ("loop", 0) for value in node.outputs}
    return stages


class _Doors:
    """What can go in or out of a loop: values whose first size is the number of rows, fixed otherwise, and narrow."""

    def __init__(self, graph: OnnxGraph, rows: OnnxValue, tokens: Sequence[Any], results: Sequence[Any]) -> None:
        self.rows = str(rows)
        products = [node.outputs[0] for node in graph if node.op_type in ("MatMul", "Gemm")]
        sized = [width(value) for value in (*tokens, *results, *products) if self.sized(value)]
        self.widest = WIDEST * max(sized, default=0)

    def sized(self, value: OnnxValue) -> bool:
        if value.shape is None or not len(value.shape) or value.dtype is None:
            return False
        first, *rest = value.shape
        return str(first) == self.rows and all(isinstance(size, int) for size in rest)

    def let(self, value: OnnxValue) -> bool:
        return self.sized(value) and width(value) <= self.widest


def width(value: OnnxValue) -> int:
    """How many numbers a value has for each row."""
    return prod(value.shape[1:])


def _reads(graph: OnnxGraph, begin: dict[int, int]) -> dict[int, int]:
    """Of each value, the states that it depends on, as bits."""
    found = dict(begin)
    for node in graph:
        bits = 0
        for value in node.inputs:
            bits |= found.get(id(value), 0)
        found.update({id(value): bits for value in node.outputs})
    return found


def _union(bits: int, closure: list[int]) -> int:
    for n, others in enumerate(closure):
        if bits >> n & 1:
            bits |= others
    return bits


def _feeds(graph: OnnxGraph, nexts: Sequence[tuple[Any, int]]) -> dict[int, int]:
    """Of each value, the loops whose next states depend on it, as bits; ``nexts`` are those states and their loops."""
    found: dict[int, int] = {}
    for value, loop in nexts:
        found[id(value)] = found.get(id(value), 0) | 1 << loop
    for node in reversed(graph):
        bits = 0
        for value in node.outputs:
            bits |= found.get(id(value), 0)
        for value in node.inputs:
            if value is not None:
                found[id(value)] = found.get(id(value), 0) | bits
    return found


def _settle(graph: OnnxGraph, stages: Stages, results: Sequence[Any], doors: _Doors) -> bool:
    """Put into a loop what cannot stand outside; whether every value then gets where it is read.

    What is too wide to go in is made inside, in the one loop that reads it; what cannot come out stays in.
    """
    wanted = {id(value) for value in results}
    changed = True
    while changed:
        changed = False
        for node in graph:
            place = stages.places[id(node)]
            if place[0] == ROWS and not _may_leave(node, place[1], stages, wanted, doors):
                readers = {stages.places[id(user)] for value in node.outputs for user, _ in value.uses()}
                forward = len(readers) == 1 and wanted.isdisjoint(map(id, node.outputs)) and max(readers)[0] == "loop"
                inside = max(readers) if forward else ("loop", max(place[1], 0))
                stages.places[id(node)] = inside
                stages.homes.update({id(value): inside for value in node.outputs})
                changed = True
    sizes = [node for node in graph if stages.places[id(node)] == SIZES and node.op_type == "Shape"]
    return all(doors.sized(node.inputs[0]) for node in sizes) and all(
        doors.sized(value) for node in graph for value in node.outputs if _carried(value, stages, wanted)
    )


def _may_leave(node: OnnxNode, after: int, stages: Stages, wanted: set[int], doors: _Doors) -> bool:
    """Whether ``node`` can run for all tokens once loop ``after`` has ended."""
    for value in node.inputs:
        home = stages.homes.get(id(value), CONSTANT)
        if home[0] == "loop" and (home[1] > after or not doors.let(value)):
            return False
    for value in node.outputs:
        places = [stages.places[id(user)] for user, _ in value.uses()]
        loops = [place[1] for place in places if place[0] == "loop"]
        if any(k <= after for k in loops) or ((loops or id(value) in wanted) and not doors.let(value)):
            return False
    return True


def _carried(value: OnnxValue, stages: Stages, wanted: set[int]) -> bool:
    """Whether a value goes through the door of a loop."""
    home = stages.homes[id(value)]
    places = [stages.places[id(user)] for user, _ in value.uses()]
    if home[0] == "loop":
        return id(value) in wanted or any(place not in (home, SIZES) for place in places)
    return home[0] == ROWS and any(place[0] == "loop" for place in places)

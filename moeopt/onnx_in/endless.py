"""Loops of a stranger's file that nothing ends: as many rounds as no machine runs, and no condition that stops them."""

from __future__ import annotations

import math

from moeopt.errors import UsageError
from moeopt.onnx_in.loops import FoundLoop, loops_of
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxGraph

MOST_ROUNDS = 1 << 24
"""Of a loop whose condition stays true, the rounds of the loops around it included."""


def check_loops(where: str, graph: OnnxGraph) -> None:
    """``UsageError`` for a loop, here or in a body, that never ends."""
    for loop in loops_of(graph):
        if math.prod(map(_certain_rounds, (*loop.around, loop))) > MOST_ROUNDS:
            raise UsageError(
                f"{where}: the node {shown_line(loop.name)!r} (Loop) runs its body more than {MOST_ROUNDS} times, and "
                "no condition stops it: it was damaged, or made to hang who runs it"
            )


def _certain_rounds(loop: FoundLoop) -> int:
    """How often a loop runs for certain; 1 where data say."""
    if not (loop.begins and loop.goes_on):
        return 1
    if loop.most is None:
        return 1 if loop.has_most else MOST_ROUNDS + 1
    return max(loop.most, 1)

"""Functions of a stranger's file: none may call itself, nor be more nodes than a graph has when written out."""

from __future__ import annotations

from moeopt.errors import UsageError
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxModel

MOST_INLINED = 1 << 18
"""Nodes of all functions, each as often as it is called."""


def check_functions(where: str, proto: OnnxModel) -> None:
    """``UsageError`` for functions that call themselves, or that are more nodes than a graph has when written out."""
    bodies = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    for first in bodies:
        path = [first]
        while path:
            key = path[-1]
            calls = [(n.domain, n.op_type) for n in bodies[key].node if (n.domain, n.op_type) in bodies]
            again = next((c for c in calls if c in path), None)
            if again is not None:
                raise UsageError(
                    f"{where}: the function {shown_line(again[1])!r} calls itself: it was damaged, or made to hang who "
                    "reads it"
                )
            todo = [c for c in calls if c not in sizes]
            if todo:
                path.append(todo[0])
                continue
            sizes[key] = len(bodies[key].node) - len(calls) + sum(sizes[c] for c in calls)
            path.pop()
    total = sum(sizes.get((n.domain, n.op_type), 0) for n in proto.graph.node)
    if total > MOST_INLINED:
        raise UsageError(
            f"{where}: its functions are {_shown_count(total)} nodes when they are written out, and moeopt reads "
            f"{MOST_INLINED}: export the model without functions of functions"
        )


def _shown_count(count: int) -> str:
    """A number that a file decides on, short."""
    return str(count) if count < 1 << 40 else "over 2^40"

"""Functions of a stranger's file: none may call itself, nor be more nodes than a graph has when written out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from moeopt.errors import UsageError
from moeopt.onnx_in.order import bodies
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxModel, OnnxNode

DEEPEST = 64
"""Functions within functions; onnx's inliner stops at 100."""
MOST_INLINED = 1 << 18
"""Nodes of all functions, each as often as it is called."""


def check_functions(where: str, proto: OnnxModel) -> None:
    """``UsageError`` for functions that call themselves, or that are more nodes than a graph has when written out."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    nodes = {key: Counter((n.domain, n.op_type) for n in _every(f.node)) for key, f in functions.items()}
    calls = {key: Counter({c: count for c, count in nodes[key].items() if c in functions}) for key in functions}
    depths: dict[tuple[str, str], int] = {}
    for first in functions:
        path = {first: iter(calls[first])}  # from the first call to the innermost, with the calls still to be seen
        while path:
            key = next(reversed(path))
            below = next((c for c in path[key] if c not in sizes), None)
            if below is not None:
                if below in path:
                    raise UsageError(
                        f"{where}: the function {shown_line(below[1])!r} calls itself: it was damaged, or made to hang "
                        "who reads it"
                    )
                path[below] = iter(calls[below])
                continue
            own = nodes[key].total() - calls[key].total()
            sizes[key] = own + sum(sizes[c] * count for c, count in calls[key].items())
            depths[key] = 1 + max((depths[c] for c in calls[key]), default=0)
            del path[key]
    deepest = max(depths.values(), default=0)
    if deepest > DEEPEST:
        raise UsageError(
            f"{where}: its functions call each other {deepest} deep, and moeopt reads {DEEPEST}: export the model "
            "without functions of functions"
        )
    total = sum(sizes.get((n.domain, n.op_type), 0) for n in _every(proto.graph.node))
    if total > MOST_INLINED:
        raise UsageError(
            f"{where}: its functions are {_shown_count(total)} nodes when they are written out, and moeopt reads "
            f"{MOST_INLINED}: export the model without functions of functions"
        )


def _every(nodes: Iterable[OnnxNode]) -> Iterator[OnnxNode]:
    """The nodes, and those of the bodies in them."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from _every(body.node)


def _shown_count(count: int) -> str:
    """A number that a file decides on, short."""
    return str(count) if count < 1 << 40 else "over 2^40"

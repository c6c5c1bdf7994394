"""Names for values that a file does not have yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moeopt.onnx_in.order import bodies
from moeopt.value_types import OnnxGraph


class FreeNames:
    """Names that nobody has: each is given once, and a new one takes constant time.

    Args:
        taken: the names that there are.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._next: dict[str, int] = {}

    def new(self, name: str) -> str:
        """``name``, with a number behind it where it is taken; taken from now on."""
        made, number = name, self._next.get(name, 1)
        while made in self._taken:
            made, number = f"{name}_{number}", number + 1
        self._next[name] = number  # the numbers below are taken
        self._taken.add(made)
        return made


def names_in(graph: OnnxGraph) -> Iterator[str]:
    """Every name of a value or a node in a graph and its bodies."""
    yield from (v.name for v in (*graph.input, *graph.output, *graph.initializer))
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for body in bodies(node):
            yield from names_in(body)

"""What one recorded run is: its module calls, its ATen calls as nodes, and the value that each node held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from moeopt.capture.tree import leaves_of
from moeopt.value_types import FxArg, PyObject


@dataclass(eq=False)
class Call:
    """One call of a submodule: which nodes it recorded, and what went in and came out.

    ``autocast``: whether it was made under ``torch.autocast``, which the code around it began.
    ``mode``: the class name of a user's mode of PyTorch (``moeopt.capture.user_modes``) under which it was made, or "".
    """

    index: int
    path: str
    module: nn.Module
    parent: int | None
    first: int
    last: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: FxArg = None
    autocast: bool = False
    mode: str = ""


class Read(NamedTuple):
    """A value that left the tape as a Python number or an array: its node, the user's line, the call it was in."""

    node: fx.Node
    line: str
    call: int


@dataclass
class Tape:
    """The record of one run. ``args``/``output`` hold fx nodes where the run had tensors."""

    root: nn.Module
    calls: list[Call]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: FxArg
    mutations: dict[fx.Node, fx.Node]
    attributes: dict[tuple[str, str], Any]
    in_place: set[tuple[str, str]]
    reads: list[Read]
    nodes: list[fx.Node]
    _values: dict[fx.Node, Any]

    def value(self, node: fx.Node) -> PyObject:
        """What ``node`` held when it was recorded (recomputed where a later write destroyed it)."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._values:
                stack.pop()
                continue
            missing = [n for n in top.all_input_nodes if n not in self._values]
            if missing:
                stack.extend(missing)
                continue
            args, kwargs = fx.map_arg((top.args, top.kwargs), self._values.__getitem__)
            self._values[top] = top.target(*args, **kwargs)  # type: ignore[operator]
            stack.pop()
        return self._values[node]

    def call_of(self, node: fx.Node) -> Call:
        """The innermost module call that recorded ``node``."""
        return self.calls[int(node.meta["call"])]

    def stack(self, index: int | None) -> list[int]:
        """Call indices from the root's call down to ``index``."""
        chain: list[int] = []
        while index is not None:
            chain.append(index)
            index = self.calls[index].parent
        return chain[::-1]

    def results(self) -> list[fx.Node]:
        """Every node that outlives the call: outputs, writes to inputs and buffers, stored attributes."""
        return leaves_of(fx.Node, [self.output, list(self.mutations.values()), list(self.attributes.values())])

    def write_origin(self, node: fx.Node) -> fx.Node | None:
        """For the result of an in-place call: the node that first owned the memory it wrote to."""
        return node.meta.get("origin")

    def random_nodes(self) -> list[fx.Node]:
        """Nodes that drew random numbers."""
        return [n for n in self.nodes if n.meta.get("random")]

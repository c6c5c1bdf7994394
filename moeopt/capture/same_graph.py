"""Do two tapes of one call compute the same? Line by line, constants and sizes included.

A line that only hands a tensor on (``detach``, ``alias``) is left out: whether autograd inserts one
depends on who else holds the tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.value_types import PyObject

_HANDED_ON = ("detach", "alias")


def same_computation(a: Tape, b: Tape, but: Collection[tuple[str, str]] = ()) -> bool:
    """True where both tapes hold the same calls on the same arguments and return, write and store the same.

    ``but`` are (module path, attribute) whose stored values do not count.
    """
    first, second = _Lines(a, but), _Lines(b, but)
    return first.lines == second.lines and first.results == second.results


def calls_made(tape: Tape) -> list[str]:
    """The names of what a call of a block called, in order."""
    return [op_name(node) for node in tape.nodes if node.op == "call_function"]


def one_computation(few: Sequence[Tape], many: Sequence[Tape]) -> bool:
    """Whether all tapes make the same calls, and those of ``few`` rows with every word that those of ``many``, which
    are of several sizes, have in common: ``x * (0.5 if len(x) > 100 else 1.0)`` is another computation for few."""
    made = [_Lines(tape, ()).lines for tape in (*many, *few)]
    if len({*map(len, made)}) > 1:
        return False
    return all(_in_common([[op, target, *args, *kwargs] for op, target, args, kwargs in versions], len(many))
               for versions in zip(*made, strict=True))  # fmt: skip


def _in_common(versions: list[list[Any]], count: int) -> bool:
    """Whether all versions of a line have what the first ``count`` have in common."""
    if len({*map(len, versions)}) > 1:
        return all(line[:2] == versions[0][:2] for line in versions)
    return not any(
        all(word == column[0] for word in column[:count]) and any(word != column[0] for word in column[count:])
        for column in zip(*versions, strict=True)
    )


class _Lines:
    """A tape as plain values: each node is the number of its line."""

    def __init__(self, tape: Tape, but: Collection[tuple[str, str]]) -> None:
        self.number: dict[fx.Node, Any] = {}
        self.lines: list[Any] = []
        for node in tape.nodes:
            if node.op == "call_function" and op_name(node) in _HANDED_ON and isinstance(node.args[0], fx.Node):
                self.number[node] = self.number[node.args[0]]
                continue
            self.number[node] = ("line", len(self.lines))
            self.lines.append((node.op, self._target(node), self._words(node.args), self._words(node.kwargs)))
        self.results = [
            self._words(tape.output),
            [(self.number[k], self.number[v]) for k, v in tape.mutations.items()],
            [(k, self._words(v)) for k, v in sorted(tape.attributes.items(), key=lambda i: i[0]) if k not in but],
        ]

    def _target(self, node: fx.Node) -> PyObject:
        constant = node.meta.get("constant")
        if isinstance(constant, torch.Tensor):
            return str(constant.dtype), tuple(constant.shape), constant.tolist()
        return node.target

    def _words(self, tree: PyObject) -> list[Any]:
        words: list[Any] = []
        stack = [tree]
        while stack:
            item = stack.pop()
            if isinstance(item, fx.Node):
                words.append(self.number[item])
            elif isinstance(item, (list, tuple)):
                words += [type(item).__name__, len(item)]
                stack += item
            elif isinstance(item, Mapping):
                words += [type(item).__name__, *map(repr, item)]
                stack += item.values()
            elif dataclasses.is_dataclass(item) and not isinstance(item, type):
                words.append(type(item).__name__)
                stack += [getattr(item, field.name, None) for field in dataclasses.fields(item)]
            elif isinstance(item, slice):
                words.append("slice")
                stack += [item.start, item.stop, item.step]
            else:
                words.append(repr(item))
        return words


def same_call(node: object, other: object, known: dict[tuple[int, int], bool] | None = None) -> bool:
    """Whether two nodes are one op on the same values, as where each expert's rows are weighed anew from the same x.

    Args:
        known: pairs of nodes that were compared, so that values which are read twice are compared once.
    """
    known = {} if known is None else known
    if node is other:
        return True
    if isinstance(node, list | tuple) and isinstance(other, list | tuple):
        return len(node) == len(other) and all(same_call(a, b, known) for a, b in zip(node, other, strict=True))
    if not isinstance(node, fx.Node) or not isinstance(other, fx.Node):
        return type(node) is type(other) and node == other
    if node.op != "call_function" or (node.op, node.target) != (other.op, other.target):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    pair = (id(node), id(other))
    if pair not in known:
        known[pair] = (
            node.kwargs.keys() == other.kwargs.keys()
            and same_call(node.args, other.args, known)
            and all(same_call(node.kwargs[key], other.kwargs[key], known) for key in node.kwargs)
        )
    return known[pair]

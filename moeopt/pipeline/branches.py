"""Branches that a block's Python takes by its routing, and that no case of verification took.

A rewrite leaves the branches of a dispatch out (``if mask.any():`` runs an expert only where it has tokens), which is
right for what a dispatch asks, and wrong for ``if (weights > 0.9).all(): y = 2 * y``: the probe calls take one way, and
the other is gone. Verification sees that only if one of its cases goes there. So each place where Python reads a bool
that depends on the arguments is watched while the original runs: a place that gave one answer on every case, and could
give the other, is a part of the code that was compared with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.bool_reads import BoolReads, ReadAt, is_assertion
from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.value_types import PyObject

_NOTS = ("logical_not", "bitwise_not")
_COMPARES = ("gt", "ne", "eq", "le", "ge", "lt")
_COUNTS = ("sum", "count_nonzero", "bincount", "histc", "scatter_add", "index_add")
_NUMBERS = ("nonzero", "_unique2", "unique_dim", "unique_consecutive")
"""They give the experts that have tokens."""
_WAY_OUT = "write both ways as tensors (torch.where), or leave the branch out"


class Branches:
    """What Python reads of one block's routing as a bool.

    Args:
        tape: a call of the block.

    Attributes:
        seen: the answers at each place, of calls that have tokens.
    """

    def __init__(self, tape: Tape | None = None) -> None:
        self.seen: dict[ReadAt, set[bool]] = {}
        self._reads: dict[str, list[_Asked]] = {}
        if tape is None:
            return
        for node, line, _ in tape.reads:
            if node.meta.get("dtype") == torch.bool and any(n.op == "placeholder" for n in ancestors([node])):
                self._reads.setdefault(line, []).append(_Asked(tape, node))

    def watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original``, whose reads are entered when it is called; itself where it makes none."""
        if not self._reads:
            return original

        def run(*args: PyObject, **kwargs: PyObject) -> PyObject:
            if not all(t.numel() for t in leaves_of(torch.Tensor, (args, kwargs))):
                return original(*args, **kwargs)  # of no token everything is true
            with BoolReads(self._enter):
                return original(*args, **kwargs)

        return run

    def check(self, run: Callable[[TorchDispatchMode], object], every: bool) -> None:
        """``Declined`` for a branch that no call took, or whose limit no number of calls explores.

        Args:
            run: calls the original under the mode that it is given, and undoes what that wrote.
            every: whether all tokens may go to all experts, so that each has tokens on every call.
        """
        for place, answers in self.seen.items():
            asked, answer = self._reads[place[0]], next(iter(answers))
            limits = [one for one in asked if one.limit]
            untried = [one for one in asked if len(answers) == 1 and not one.can_only_be(answer, every)]
            if not limits and not untried or is_assertion(run, place[0]):
                continue
            if limits:
                why = f"its forward branches on a comparison of routing weights with a limit ({limits[0].name})"
                raise Declined(f"{why}, which the rewritten code would leave out; {_WAY_OUT}", place[0])
            raise Declined(
                f"its forward branches on a value computed from the routing ({untried[0].name}) that is {answer} in "
                f"every case of verification, so what it does where that is {not answer} was compared with nothing; "
                f"{_WAY_OUT}",
                place[0],
            )

    def _enter(self, place: ReadAt, answer: bool) -> bool:
        if place[0] in self._reads:
            self.seen.setdefault(place, set()).add(answer)
        return answer


class _Asked:
    """One read on the tape.

    Attributes:
        name: of the op that gave the answer.
        limit: whether weights are compared with anything but zero.
    """

    def __init__(self, tape: Tape, node: fx.Node) -> None:
        self.name = op_name(node)
        compared, over, (after, before) = _comparison(node)
        op, operands = op_name(compared), compared.all_input_nodes
        floats = any(n.meta["dtype"].is_floating_point for n in operands if n.meta.get("dtype") is not None)
        zero = op in _COMPARES and type(compared.args[1]) in (int, float) and compared.args[1] == 0
        source = _moved(operands[0]) if operands else compared
        self.limit = floats and op in _COMPARES and not zero
        self._number = over is None and op in ("eq", "ne") and op_name(source) in _NUMBERS
        has: bool | None = None  # the answer of the comparison that says that an expert has a token
        if zero and (floats or op_name(source) in _COUNTS or _is_mask(tape, source)):
            has = {"gt": True, "ne": True, "eq": False, "le": False}.get(op)
        elif over is not None and not floats:
            has = {"eq": True, "ne": False}.get(op, True if op not in _COMPARES else None)
        has = None if has is None else has ^ before
        self._hit = None if has is None or (over is not None and has is not over) else has ^ after

    def can_only_be(self, answer: bool, every: bool) -> bool:
        """Whether ``answer`` alone is no sign of an untried way: of a comparison of an expert's number with one that
        none has, which the bounds of the ids guard; that an expert has tokens, where ``every`` one has."""
        return self._number or (every and self._hit is answer)


def _comparison(node: fx.Node) -> tuple[fx.Node, bool | None, tuple[bool, bool]]:
    """What is asked of each token or of a number; whether the answers are taken together by ``any`` (True), ``all``
    (False) or not at all (None); and whether the answer is turned after that, and before it."""
    over: bool | None = None
    after, before = False, False
    while True:
        name = op_name(node)
        if over is None and name in ("any", "all"):
            over = name == "any"
        elif name in _NOTS:
            after, before = (not after, before) if over is None else (after, not before)
        elif not moves_rows(node) or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return (node, over, (after, before)) if over is not None else (node, over, (False, after))


def _moved(node: fx.Node) -> fx.Node:
    while moves_rows(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_mask(tape: Tape, node: fx.Node) -> bool:
    """Whether whole numbers are marks, zero or one."""
    value = tape.value(node)
    return isinstance(value, torch.Tensor) and bool(((value == 0) | (value == 1)).all())

"""Branches that the routing decides and that no case of verification took.

A rewrite drops the branches of a dispatch. That is right for ``if mask.any():``, which runs an expert only if it has
tokens, and wrong for ``if (weights > 0.9).all(): y = 2 * y``: the probe calls take one branch, and the other is lost.
Verification sees the loss only if one of its cases takes that branch. So each place where Python reads a bool that
depends on the arguments is watched while the original runs. A place that had one answer in every case, and could have
the other, guards code that was compared with nothing. Conditions on numbers that Python reads, and on sizes that depend
on values, are watched in the bytecode (``moeopt.control_flow.untaken_branches``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.bool_reads import BoolReads, ReadAt, is_assertion
from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.control_flow.branches_taken import BranchesTaken
from moeopt.control_flow.untaken_branches import DispatchFacts, RunWatched, untaken
from moeopt.errors import Declined
from moeopt.value_types import PyObject

_NOTS = ("logical_not", "bitwise_not")
_COMPARES = ("gt", "ne", "eq", "le", "ge", "lt")
_COUNTS = ("sum", "count_nonzero", "bincount", "histc", "scatter_add", "index_add")
_NUMBERS = ("nonzero", "_unique2", "unique_dim", "unique_consecutive")
"""Ops that return the experts that have tokens."""
_SIZED = (*_NUMBERS, "index", "masked_select", "repeat_interleave", "bincount", "equal")
"""Ops whose result has a size that depends on values, or is read by Python."""
_WAY_OUT = "write both ways as tensors (torch.where), or leave the branch out"


class RoutingBranches:
    """The bools that Python reads of one block's routing.

    Args:
        tape: a recorded call of the block.

    Attributes:
        seen: by place, the answers in calls with tokens.
        tests: the answers of conditions in the code, where the call reads numbers or has sizes that depend on values.
        line: the last line that reads a number, else the last one with a size that depends on values.
    """

    def __init__(self, tape: Tape | None = None) -> None:
        self.seen: dict[ReadAt, set[bool]] = {}
        self.tests: BranchesTaken | None = None
        self.line: str | None = None
        self._reads: dict[str, list[_Asked]] = {}
        if tape is None:
            return
        if _reads_numbers(tape):
            self.tests = BranchesTaken()
        numbers = [r.line for r in tape.reads if r.node.meta.get("dtype") != torch.bool]
        sized = [n.meta["source"] for n in tape.nodes if op_name(n) in _SIZED and n.meta.get("source")]
        self.line = next(iter([*reversed(numbers), *reversed(sized)]), None)
        for node, line, _ in tape.reads:
            if node.meta.get("dtype") == torch.bool and any(n.op == "placeholder" for n in ancestors([node])):
                self._reads.setdefault(line, []).append(_Asked(tape, node))

    @property
    def any(self) -> bool:
        """Whether Python may branch on the routing: it reads bools, numbers or sizes that depend on the arguments."""
        return bool(self._reads) or self.tests is not None

    def watched(self, original: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        """``original``, a call of ``module``, with its answers recorded; itself where there is nothing to record."""
        return _WatchedCall(self, original, module) if self.any else original

    def check(self, run: Callable[[TorchDispatchMode], object], every: bool) -> None:
        """``Declined`` for a branch that no call took, or that compares a weight with a limit, which no calls explore.

        Args:
            run: calls the original under a mode, and restores the state that the call changed.
            every: whether all tokens may go to all experts, so that every expert has tokens in every call.
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

    def check_tests(self, groups: Iterable[Iterable[Callable[[RunWatched], object]]], dispatch: DispatchFacts) -> None:
        """``Declined`` for a condition with an untaken branch; ``groups`` as for ``untaken``."""
        if self.tests is None:
            return
        for one in untaken(self.tests, groups, dispatch):
            raise Declined(
                f"its forward branches on numbers or sizes that its input decides ({one.text}), which is {one.answer} "
                f"in every case of verification, so what it does where that is {not one.answer} was compared with "
                f"nothing; {_WAY_OUT}",
                one.line,
            )

    def enter(self, reads: dict[ReadAt, set[bool]], tests: BranchesTaken) -> None:
        """Record the answers of one call."""
        for place, answers in reads.items():
            if place[0] in self._reads:
                self.seen.setdefault(place, set()).update(answers)
        for test, given in tests.answers.items():
            if self.tests is not None:
                self.tests.answers.setdefault(test, set()).update(given)


class _WatchedCall:
    """A call of ``module`` whose answers are recorded; verification restores what the call writes to ``module``.

    A call whose result cannot show a difference is left out: without tokens ``all()`` holds, and twice a zero is zero.
    """

    def __init__(self, into: RoutingBranches, original: Callable[..., Any], module: nn.Module) -> None:
        self._into, self._original, self.module = into, original, module

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        if not all(t.numel() for t in leaves_of(torch.Tensor, (args, kwargs))):
            return self._original(*args, **kwargs)
        reads: dict[ReadAt, set[bool]] = {}
        tests = BranchesTaken()

        def answer(place: ReadAt, own: bool) -> bool:
            reads.setdefault(place, set()).add(own)
            return own

        run = self._original if self._into.tests is None else functools.partial(tests.watching, self._original)
        with BoolReads(answer):
            out = run(*args, **kwargs)
        if _shows_something(out, (args, kwargs)):
            self._into.enter(reads, tests)
        return out


def _shows_something(out: PyObject, given: PyObject) -> bool:
    """Whether a result, or what a forward without one writes, holds a number that is neither zero nor NaN."""
    numbers = [t for tree in (out, given) for t in leaves_of(torch.Tensor, tree) if t.dtype.is_floating_point]
    first = [t for t in leaves_of(torch.Tensor, out) if t.dtype.is_floating_point] or numbers
    return not first or any(bool((t.isfinite() & (t != 0)).any()) for t in first)


class _Asked:
    """A bool that Python reads, as the tape has it.

    Attributes:
        name: of the op that computes the bool.
        limit: whether it compares weights with a number other than zero.
    """

    def __init__(self, tape: Tape, node: fx.Node) -> None:
        self.name = op_name(node)
        compared, over, (after, before) = _comparison(node)
        op, operands = op_name(compared), compared.all_input_nodes
        floats = any(n.meta["dtype"].is_floating_point for n in operands if n.meta.get("dtype") is not None)
        zero = op in _COMPARES and type(compared.args[1]) in (int, float) and compared.args[1] == 0
        source = _moved(operands[0]) if operands else compared
        self.limit = floats and op in _COMPARES and not zero
        self._number = (
            over is None and op in _COMPARES and op_name(source) in _NUMBERS and _each_of(operands[0], source)
        )
        has: bool | None = None  # the comparison's answer where an expert has a token
        if zero and (floats or op_name(source) in _COUNTS or _is_mask(tape, source)):
            has = {"gt": True, "ne": True, "eq": False, "le": False}.get(op)
        elif over is not None and not floats:
            has = {"eq": True, "ne": False}.get(op, True if op not in _COMPARES else None)
        has = None if has is None else has ^ before
        self._hit = None if has is None or (over is not None and has is not over) else has ^ after

    def can_only_be(self, answer: bool, every: bool) -> bool:
        """Whether no call can have another answer than ``answer``.

        So it is where an expert's id is compared with an id that no expert has, against which the bounds of the ids
        guard, and where the question is whether an expert has tokens and ``every`` expert has.
        """
        return self._number or (every and self._hit is answer)


def _reads_numbers(tape: Tape) -> bool:
    """Whether Python reads numbers (no bools) that depend on the arguments: values, sizes, or a Python result."""
    reads = [r.node for r in tape.reads if r.node.meta.get("dtype") != torch.bool]
    sized = [n for n in tape.nodes if op_name(n) in _SIZED]
    return any(n.op == "placeholder" for n in ancestors([*reads, *sized]))


def _comparison(node: fx.Node) -> tuple[fx.Node, bool | None, tuple[bool, bool]]:
    """The comparison behind a bool; whether ``any`` (True), ``all`` (False) or neither (None) reduces it; and whether
    it is negated after that reduction, and before it."""
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


def _each_of(node: fx.Node, numbers: fx.Node) -> bool:
    """Whether ``node`` is the loop variable of a loop over ``numbers``, and not one fixed item of it."""
    while node is not numbers:
        if op_name(node) == "unbind" or len({user.args[2:] for user in node.users if op_name(user) == "select"}) > 1:
            return True
        node = node.all_input_nodes[0]
    return len({user.args[2:] for user in numbers.users if op_name(user) == "select"}) > 1


def _is_mask(tape: Tape, node: fx.Node) -> bool:
    """Whether integers are a mask of zeros and ones."""
    value = tape.value(node)
    return isinstance(value, torch.Tensor) and bool(((value == 0) | (value == 1)).all())

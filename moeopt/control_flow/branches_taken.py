"""Which branch each condition in a model's code took: of ``if``, ``while``, ``and``, ``or`` and comprehensions.

A tensor that Python reads leaves a node on the tape; the comparison of the number afterwards leaves none:
``int(ids.max()) < 4``, ``len(set(ids.tolist())) == 1``, ``hit.unique().numel() > 1``. So the conditional jumps of the
bytecode are watched with ``sys.settrace``, which does not change the code that runs and acts on one thread. A function
that returns a bool counts as a condition, because its caller jumps on the result of the call.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from moeopt.capture.source_line import is_the_users
from moeopt.control_flow.watched_call import watched_call
from moeopt.value_types import PyObject

Position = tuple[int, ...]
"""Line, column, last line and last column of an expression; of one instruction its offset."""
BranchPlace = tuple[types.CodeType, Position]
"""A condition in a model's code."""
LookAtBranch = Callable[[BranchPlace, types.FrameType, "BranchesTaken"], None]

_STANDARD = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
_PACKAGES = ("site-packages", "dist-packages")
_NO_MODEL_IS_IN = ("/numpy/", "/einops/")
_NO_VALUE = ("COPY", "TO_BOOL", "NOT_TAKEN", "CACHE")
"""Instructions between the one that computes a condition and the jump."""
_LINKS = ("COMPARE_OP", "IS_OP", "CONTAINS_OP")
_GOES_ON = (["SWAP", "COPY"], ["DUP_TOP", "ROT_THREE"])
"""Instructions before a comparison of a chain (``a < b < c``) that keep the operand for the next one."""
_RETURNS = ("RETURN_VALUE", "RETURN_CONST")


class BranchesTaken:
    """The answers of each condition in all calls made under ``watching``.

    Args:
        look: called before a condition is decided, with the frame that runs it.
        only: the conditions for which ``look`` is called.

    Attributes:
        answers: by condition.
        returned: by the place of a call in the model's code, the last result of the called function; kept for ``look``.
    """

    __test__ = False  # not for pytest

    def __init__(self, look: LookAtBranch | None = None, only: frozenset[BranchPlace] = frozenset()) -> None:
        self.answers: dict[BranchPlace, set[bool]] = {}
        self.returned: dict[BranchPlace, Any] = {}
        self._look, self._only = look, only
        self._freeing: set[types.CodeType] = set()

    def watching(self, run: Callable[..., Any], *args: PyObject, **kwargs: PyObject) -> PyObject:
        """``run(*args, **kwargs)``, watched."""
        # Python 3.12 traces instructions from the next ``settrace`` on after a frame first asked for them
        sys._getframe().f_trace_opcodes = True
        return watched_call(self._enter, run, *args, **kwargs)

    def _enter(self, frame: types.FrameType, event: str, _: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if not of_a_model(code.co_filename):
            return None
        if _frees(frame):
            self._freeing.add(code)
        if not (jumps := _jumps(code)) or self._of_the_collector(frame):
            return None
        inside = frame.f_trace = _InFrame(self, jumps)  # before the next line: Python 3.13 asks for it there
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    def _of_the_collector(self, frame: types.FrameType) -> bool:
        """Whether Python called it when memory was freed: a finalizer, what a weak reference calls, or what a library
        (hypothesis, a profiler) has the collector call. None of them is code of the model."""
        callbacks = {getattr(getattr(one, "__func__", one), "__code__", None) for one in gc.callbacks}
        callbacks |= {weakref.finalize.__call__.__code__, *self._freeing}
        at: types.FrameType | None = frame
        while at is not None and not isinstance(at.f_trace, _InFrame):
            if at.f_code in callbacks:
                return True
            at = at.f_back
        return False

    def reached(self, place: BranchPlace, frame: types.FrameType) -> None:
        """Tell of a test that is about to be decided."""
        if self._look is not None and place in self._only:
            self._look(place, frame, self)

    def answered(self, place: BranchPlace, answer: bool) -> None:
        """Enter the answer of one test."""
        self.answers.setdefault(place, set()).add(answer)

    def came_back(self, caller: types.FrameType | None, value: PyObject) -> None:
        """Enter what a function returned."""
        if self._look is not None and caller is not None and of_a_model(caller.f_code.co_filename):
            self.returned[caller.f_code, call_places(caller.f_code).get(caller.f_lasti, ())] = value


def _frees(frame: types.FrameType) -> bool:
    """Whether a frame that was just entered frees memory, as Python may at any instruction of a model: its function is
    the finalizer of its first argument's class, under any name (``__del__ = close``), or was given a weak reference
    whose object is gone, as the callback of one is."""
    code = frame.f_code
    if code.co_name == "__del__":
        return True
    given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    last = getattr(type(given[0]), "__del__", None) if given else None
    return getattr(last, "__code__", None) is code or any(type(one) is weakref.ref and one() is None for one in given)


@dataclass(frozen=True, eq=False)
class _Jump:
    """A conditional jump, or a return.

    Attributes:
        place: of the test; the compiler makes several jumps of one test, as of a ``while``.
        after: where the frame is next if it does not jump; () for a return.
        stays: the answer with which it does not.
        only: the one answer that decides the test; None where both do. ``a < b`` of ``a < b < c`` decides it if False.
    """

    place: BranchPlace
    after: tuple[int, ...]
    stays: bool
    only: bool | None = None


class _InFrame:
    """The local trace function of one frame."""

    def __init__(self, into: BranchesTaken, jumps: dict[int, _Jump]) -> None:
        self._into, self._jumps = into, jumps
        self._last: _Jump | None = None

    def __call__(self, frame: types.FrameType, event: str, arg: PyObject) -> _InFrame:
        last = self._last
        if event == "opcode":
            jump = self._jumps.get(frame.f_lasti)
            if jump is not None and jump is last:  # the instruction after its prefix
                return self
            if last is not None and last.after:
                answer = last.stays is (frame.f_lasti in last.after)
                if last.only in (None, answer):
                    self._into.answered(last.place, answer)
            self._last = jump
            if jump is not None:
                self._into.reached(jump.place, frame)
        elif event == "return":
            self._into.came_back(frame.f_back, arg)
            if last is not None and not last.after and isinstance(arg, (bool, np.bool_)):
                self._into.answered(last.place, bool(arg))
        elif event == "exception":
            self._last = None
        return self


@functools.lru_cache(maxsize=4096)
def _jumps(code: types.CodeType) -> dict[int, _Jump]:
    """The conditional jumps of ``code``, by the offset of the instruction and of each of its prefixes."""
    found: dict[int, _Jump] = {}
    groups: list[list[dis.Instruction]] = [[]]
    for one in dis.get_instructions(code):
        groups[-1].append(one)
        if one.opname != "EXTENDED_ARG":
            groups.append([])
    pushed, names, only = groups[0][-1], list[str](), cast("bool | None", None)
    for group, following in zip(groups, groups[1:], strict=False):
        name, place = group[-1].opname, (code, _position(pushed))
        jump: _Jump | None = None
        if name in _RETURNS:
            jump = _Jump(place, (), True)
        elif "JUMP" in name and ("_IF_FALSE" in name or "_IF_TRUE" in name):
            jump = _Jump(place, tuple(one.offset for one in following), "_IF_FALSE" in name, only)
        if jump is not None:
            found.update((one.offset, jump) for one in group)
        if name not in _NO_VALUE:
            pushed, only = group[-1], False if name in _LINKS and names[-2:] in _GOES_ON else None
        names.append(name)
    ends = {jump.place for jump in found.values() if jump.only is None}  # a chain that is kept as a value has no such
    told = {jump: jump if jump.place in ends else replace(jump, only=None) for jump in found.values()}
    return {at: told[jump] for at, jump in found.items()}


def _position(instruction: dis.Instruction) -> Position:
    """The position of an instruction in the source; its offset before Python 3.11, whose code holds no columns."""
    at = getattr(instruction, "positions", None)
    if at is None or None in at:
        return (instruction.offset,)
    return (at.lineno, at.col_offset, at.end_lineno, at.end_col_offset)


@functools.lru_cache(maxsize=1024)
def call_places(code: types.CodeType) -> dict[int, Position]:
    """The source position of each word of ``code``, by offset; none before Python 3.11, whose code holds no columns.

    While a called function runs, the caller's frame points at the last word of the call, which has several words.
    """
    words = enumerate(getattr(code, "co_positions", tuple)())
    return {2 * at: (line, begin, last, end) for at, (line, last, begin, end) in words if None not in (line, begin)}


@functools.lru_cache(maxsize=4096)
def of_a_model(file: str) -> bool:
    """Whether ``file`` may hold a model's code: it is neither PyTorch's, nor Python's, nor moeopt's."""
    if not is_the_users(file) or any(part in file for part in _NO_MODEL_IS_IN):
        return False
    return not file.startswith(_STANDARD) or any(part in file for part in _PACKAGES)

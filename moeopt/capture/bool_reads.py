"""What Python reads of tensors as a bool, and where; a read may be given another answer, to see what follows.

assert x.isfinite().all()      the other answer raises: it is an assertion, and gives no other numbers
if mask.any(): y[mask] = ...   the other answer goes another way
"""

from __future__ import annotations

import dis
import functools
import itertools
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.source_line import user_line
from moeopt.value_types import FxTarget, PyObject

ReadAt = tuple[str, int]
"""A line of the user's code, and the instruction in it."""
_AROUND = (
    str(Path(__file__).parents[1]),
    *(
        f"{torch.__path__[0]}/{part}"
        for part in ("_dynamo/", "_compile.py", "_ops.py", "utils/_python", "__init__.py", "overrides.py", "_tensor.py",
                     "fx/experimental/")
    ),
)  # fmt: skip
"""What stands between a mode and the code that called an op, or asked a size: other modes, and what keeps them from
being compiled; the Python of tensors and of symbolic sizes."""
READ = torch.ops.aten._local_scalar_dense.default
"""The op by which Python gets the number of a tensor."""


class BoolReads(TorchDispatchMode):
    """Hands each bool that Python reads, with its place, to ``answer``, and gives Python what that returns.

    Attributes:
        asking: the function that read last.
    """

    def __init__(self, answer: Callable[[ReadAt, bool], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._answer = answer
        self.asking: CodeType | None = None

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        out = func(*args, **(kwargs or {}))
        if func is not READ or not isinstance(out, bool):
            return out
        asked = asked_from()
        self.asking = None if asked is None else asked[0]
        return self._answer(read_at(), out)


def asked_from() -> tuple[CodeType, int] | None:
    """The function that calls an op now, the user's or a library's, and the instruction in it."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller.f_code.co_filename.startswith(_AROUND):
        caller = caller.f_back
    return None if caller is None else (caller.f_code, _calls_of(caller.f_code).get(caller.f_lasti, caller.f_lasti))


@functools.lru_cache(maxsize=4096)
def _calls_of(code: CodeType) -> dict[int, int]:
    """The call that each place inside of its instruction belongs to.

    In Python 3.11 a call that has run often stands at its PRECALL. Where a function of Python's is called, the caller
    stands behind the call's caches, and at the call itself where it is one of C's: ``len`` may be either.
    """
    every = list(dis.get_instructions(code))
    found = {n: one.offset for one, after in itertools.pairwise(every) for n in range(one.offset + 2, after.offset, 2)}
    precalls = {one.offset: after.offset for one, after in itertools.pairwise(every) if one.opname == "PRECALL"}
    return found | precalls | {n: precalls[at] for n, at in found.items() if at in precalls}


def read_at() -> ReadAt:
    """The place of the user's code that runs now."""
    line = user_line()
    frame: FrameType | None = sys._getframe(1)
    last = frame
    while frame is not None and f"{frame.f_code.co_filename}:{frame.f_lineno}" != line:
        last, frame = frame, frame.f_back
    at = frame or last
    return line, at.f_lasti if at is not None else -1


def is_assertion(run: Callable[[TorchDispatchMode], object], line: str) -> bool:
    """Whether the other answers at ``line`` make the function that asks raise an error, by a statement of its own.

    An operation that fails on the other way (an empty maximum) is no assertion: for other inputs it does not fail.
    Each question is turned once: a ``while`` that is always told to go on would never end.

    Args:
        run: calls the code under the mode that it is given, and undoes what that wrote.
    """
    turned: set[ReadAt] = set()
    asking: list[CodeType | None] = []

    def answer(place: ReadAt, own: bool) -> bool:
        if place[0] != line or place in turned:
            return own
        turned.add(place)
        asking.append(mode.asking)
        return not own

    mode = BoolReads(answer)
    try:
        run(mode)
    except Exception as err:
        return any(raised_in(err, code) for code in asking)
    return False


def raised_in(err: BaseException, code: CodeType | None) -> bool:
    """Whether a ``raise`` or an ``assert`` of the function of ``code`` raised it."""
    where: PyObject = err.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    if where is None or where.tb_frame.f_code is not code:
        return False
    text = linecache.getline(code.co_filename, where.tb_lineno).strip()
    return text.startswith(("raise", "assert"))

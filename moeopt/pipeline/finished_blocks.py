"""Verdicts that outlive a process: blocks that an earlier run of the same work verified are not verified again.

The work of hours may be cut off. Whoever keeps a journal of it opens :func:`remembered`; each verdict is written down
as it is reached, and one that was reached before is taken instead of a new one where a block is only bound to the graph
of another (``pipeline.alike_blocks``). The first block of each kind is always read and verified anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from moeopt.verification.results import BlockCheck


@dataclass(frozen=True)
class FinishedBlocks:
    """``checks``: verdicts of an earlier run by block; ``note`` is told each one of this run."""

    checks: Mapping[str, BlockCheck]
    note: Callable[[BlockCheck], None]


_current: ContextVar[FinishedBlocks | None] = ContextVar("moeopt_finished_blocks", default=None)


@contextlib.contextmanager
def remembered(finished: FinishedBlocks | None) -> Iterator[None]:
    """While open, verdicts go to ``finished`` and come from there."""
    token = _current.set(finished)
    try:
        yield
    finally:
        _current.reset(token)


def recall(name: str) -> BlockCheck | None:
    """The verdict on a block that an earlier run passed."""
    finished = _current.get()
    found = None if finished is None else finished.checks.get(name)
    return found if found is not None and found.passed else None


def note(check: BlockCheck) -> None:
    """Write down a verdict of this run, where somebody keeps them."""
    finished = _current.get()
    if finished is not None and check.name not in finished.checks:
        finished.note(check)

"""A temporary folder that goes when nobody holds it, or with the process that made it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_parent: ContextVar[Path | None] = ContextVar("moeopt_temp_parent", default=None)


class TemporaryFolder:
    """``name`` is its path. A forked child that lets go of it leaves the parent's files alone."""

    def __init__(self) -> None:
        parent = _parent.get()
        self.name = tempfile.mkdtemp(prefix="moeopt-" if parent is None else ".moeopt-", dir=parent)
        weakref.finalize(self, _remove, self.name, os.getpid())


@contextlib.contextmanager
def folders_in(parent: Path | None) -> Iterator[None]:
    """While open, temporary folders are made in ``parent``: on the disk that has room for what they will hold."""
    token = _parent.set(parent)
    try:
        yield
    finally:
        _parent.reset(token)


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(name, ignore_errors=True)

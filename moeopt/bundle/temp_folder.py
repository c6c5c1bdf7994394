"""A temporary folder that goes when nobody holds it, or with the process that made it.

One beside a bundle may hold all of its weights: it is locked, so that what a killed process left there is known.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from moeopt.bundle import aside

_BESIDE = ".moeopt-engine-"
_parent: ContextVar[Path | None] = ContextVar("moeopt_temp_parent", default=None)


class TemporaryFolder:
    """``name`` is its path. A forked child that lets go of it leaves the parent's files alone."""

    def __init__(self) -> None:
        parent = _parent.get()
        held = None
        if parent is None:
            self.name = tempfile.mkdtemp(prefix="moeopt-")
        else:
            path, held = aside.made(parent, _BESIDE)
            self.name = str(path)
        weakref.finalize(self, _remove, self.name, os.getpid(), held)


@contextlib.contextmanager
def folders_in(parent: Path | None) -> Iterator[None]:
    """While open, temporary folders are made in ``parent``: on the disk that has room for what they will hold.

    Those that killed processes left there are removed.
    """
    if parent is not None:
        aside.remove_unheld(parent, re.escape(_BESIDE) + "[a-z0-9_]{8}")
    token = _parent.set(parent)
    try:
        yield
    finally:
        _parent.reset(token)


def _remove(name: str, owner: int, held: int | None) -> None:
    if os.getpid() == owner:
        shutil.rmtree(name, ignore_errors=True)
    if held is not None:
        os.close(held)

"""Folders beside a bundle that a save writes to before it moves them into place, and those that a killed save left.

The process that makes such a folder holds a lock on it, which the system releases when that process ends, however it
ends. So a folder whose lock can be had belongs to nobody.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and so nothing is cleared
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def folder(target: Path, kind: str = "") -> Iterator[Path]:
    """A new folder beside ``target``, locked while it is used; what is left of it then is removed."""
    made, lock = _made(target, kind)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear_abandoned(target: Path) -> None:
    """Remove the folders that killed saves to ``target`` left beside it; those of living ones stay."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(old\.)?[a-z0-9_]{{8}}")
    for path in target.parent.iterdir():
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _made(target: Path, kind: str) -> tuple[Path, int | None]:
    while True:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.{kind}", dir=target.parent))
        lock = _lock(made)
        if made.is_dir():  # else another save took it for abandoned in the moment before it was locked
            return made, lock
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where another process has it, or the file system has none."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor

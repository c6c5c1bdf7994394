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

from moeopt.file_lock import CAN_LOCK, try_lock


@contextlib.contextmanager
def folder(target: Path, kind: str = "") -> Iterator[Path]:
    """A new folder beside ``target``, locked while it is used; what is left of it then is removed."""
    found, lock = made(target.parent, f".{target.name}.{kind}")
    try:
        yield found
    finally:
        shutil.rmtree(found, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def clear_abandoned(target: Path) -> None:
    """Remove the folders that killed saves to ``target`` left beside it; those of living ones stay."""
    remove_unheld(target.parent, rf"\.{re.escape(target.name)}\.(old\.)?[a-z0-9_]{{8}}")


def remove_unheld(parent: Path, name: str) -> None:
    """Remove the folders in ``parent`` whose whole name the pattern ``name`` matches, and whose lock nobody holds."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if re.fullmatch(name, path.name) and path.is_dir() and not path.is_symlink():
            lock = locked(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def made(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder in ``parent``, and the descriptor that holds its lock, None where the system has none."""
    while True:
        found = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = locked(found)
        if found.is_dir():  # else another process took it for abandoned in the moment before it was locked
            return found, lock
        if lock is not None:
            os.close(lock)


def locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where another process has it, or the file system has none."""
    if not CAN_LOCK:  # and so nothing is cleared
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None

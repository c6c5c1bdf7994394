"""A folder that one process works in, or that several read what was done there; the system lets go with a process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from moeopt.file_lock import CAN_LOCK, try_lock


def take(folder: Path, busy: Callable[[], None], complete: Callable[[], bool]) -> tuple[int | None, bool]:
    """Make ``folder`` and hold it.

    Args:
        busy: called while another process works there; raises, or waits a moment.
        complete: whether all work there is done, so that others may read it at the same time.

    Returns:
        (a descriptor to close, None where nothing can be locked; whether this process is the one that works there).
    """
    if not CAN_LOCK:
        folder.mkdir(parents=True, exist_ok=True)
        return None, True
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its last owner removed it in this moment
            continue
        alone = try_lock(descriptor)
        if (alone or try_lock(descriptor, shared=True)) and _is(descriptor, folder):
            if complete():
                try_lock(descriptor, shared=True)
                return descriptor, False
            if alone:
                return descriptor, True
        gone = not _is(descriptor, folder)  # the lock of a folder that its last owner has removed holds nothing
        os.close(descriptor)
        if not gone:
            busy()


def _is(descriptor: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    return False

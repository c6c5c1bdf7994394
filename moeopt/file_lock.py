"""A lock on an open file or folder, held against other processes; the system releases a process's locks as it ends.

Where the system has no such locks (Windows), nothing is locked: ``CAN_LOCK`` is False, and every lock is granted.
"""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock was had at once.

    Args:
        shared: others may hold it shared at the same time; a lock that this process holds alone becomes a shared one.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def wait_for_lock(descriptor: int) -> None:
    """Take the lock alone, once every other process has let go of it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

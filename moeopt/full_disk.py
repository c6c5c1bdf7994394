"""What the system refuses to write, told with the file and the way out."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_WAYS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for more",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or take another disk",
}


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """While open, an ``OSError`` names ``path`` where it names no file, and says what to do where the disk is full."""
    try:
        yield
    except OSError as err:
        way, said = _WAYS.get(err.errno or 0, ""), err.strerror or str(err)
        if err.errno is None or (err.filename is not None and (not way or way in said)):  # told closer to the file
            raise
        raise OSError(err.errno, f"{said}: {way}, and call again" if way else said, str(err.filename or path)) from err

"""A temporary folder that goes when nobody holds it, or with the process that made it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref


class TemporaryFolder:
    """``name`` is its path. A forked child that lets go of it leaves the parent's files alone."""

    def __init__(self) -> None:
        self.name = tempfile.mkdtemp(prefix="moeopt-")
        weakref.finalize(self, _remove, self.name, os.getpid())


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(name, ignore_errors=True)

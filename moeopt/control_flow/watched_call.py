"""A call whose Python frames are watched, on its own thread; another watcher, as of a debugger, comes back after it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from moeopt.value_types import PyObject

Enter = Callable[[types.FrameType, str, Any], "Callable[..., Any] | None"]
"""What ``sys.settrace`` takes: called for each new frame, it gives what watches that frame, or None."""


def watched_call(enter: Enter, run: Callable[..., Any], *args: PyObject, **kwargs: PyObject) -> PyObject:
    """``run(*args, **kwargs)`` with ``enter`` as this thread's trace function."""
    before = sys.gettrace()
    sys.settrace(enter)
    try:
        return run(*args, **kwargs)
    finally:
        sys.settrace(before)

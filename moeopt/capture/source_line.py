"""The line of the user's code that runs now."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

_NOT_THE_USERS = (torch.__path__[0], str(Path(__file__).parents[1]))


def user_line() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""

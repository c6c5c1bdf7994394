"""The line of the user's code that runs now, or that raised an error."""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path
from types import TracebackType

import torch

from moeopt.value_types import PyObject

_NOT_THE_USERS = (torch.__path__[0], str(Path(__file__).parents[1]), contextlib.__file__)
"""Files of torch and of moeopt, and the one through which torch's decorators call a forward."""
_NODES = str(Path(__file__).parents[1] / "onnx_in" / "interpreter.py")
"""The file that runs the nodes of an ONNX graph, which no line of Python wrote."""


def user_line() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours; "" for a node of an ONNX graph."""
    frame: PyObject = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS) and not name.startswith("<"):  # for every call on a tape: no call here
            return f"{name}:{frame.f_lineno}"
        if name == _NODES:
            return ""
        frame = frame.f_back
    return ""


def raising_line(where: TracebackType | None) -> str:
    """As :func:`user_line`, of the frame in which an error was raised."""
    found = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(where) if is_the_users(f.filename)]
    return found[-1] if found else ""


def is_the_users(file: str) -> bool:
    """Whether ``file`` holds neither torch's code nor ours."""
    return not file.startswith(_NOT_THE_USERS) and not file.startswith("<")

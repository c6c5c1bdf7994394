"""What a forward asks of the world outside of its process: variables, clocks, files and random numbers of Python's own.

Variables are compared at each call, those whose names are computed too, since the lookups themselves are seen. The
rest has no value that could be compared: a clock differs at each call, a file is as dear to look at as a call is. It
is told in the report, where the code that asks is the user's or a helper of Python's that exists for nothing else:

    if time.time() < self.deadline: ...    scale = json.load(open(path))["scale"]    random.random() < self.drop

Another thread is the one thing outside of which nothing is seen at all: neither its Python nor its ops.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import multiprocessing.pool
import os
import queue
import random
import threading
import types

import torch

from moeopt.capture.held_contents import foreign
from moeopt.options import ALL_VARIABLES, EVERY_VARIABLE, ONE_VARIABLE
from moeopt.value_types import PyObject

_ASKS = {
    "time": {
        "time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
        "process_time_ns", "thread_time", "localtime", "gmtime", "ctime", "clock_gettime",
    },
    "_io": {"open", "open_code"},
    "resource": {"getrusage"},
    "posix": {"stat", "lstat", "listdir", "scandir", "access", "open", "urandom", "getloadavg", "readlink"},
}  # fmt: skip
_ASKS |= {"io": _ASKS["_io"], "nt": _ASKS["posix"]}
"""Builtin functions by their module."""
_OF_OBJECTS: tuple[tuple[type, frozenset[str]], ...] = (
    (random.Random, frozenset(("random", "getrandbits"))),
    (torch.Generator, frozenset(("get_state",))),
)
_NOW = frozenset(("now", "utcnow", "today"))
_HELPERS = frozenset((
    "os", "genericpath", "posixpath", "ntpath", "pathlib", "pathlib._local", "pathlib._abc", "glob", "random", "uuid",
    "secrets", "tempfile", "datetime", "io", "codecs", "fileinput", "torch.random",
))  # fmt: skip
"""Modules that are called to ask for just that; what others ask (a logger for the time) is their own affair."""


_THREADS = {
    function.__code__: name
    for name, function in {
        "Thread.start": threading.Thread.start,
        "Thread.join": threading.Thread.join,
        "Event.wait": threading.Event.wait,
        "Condition.wait": threading.Condition.wait,
        "Queue.get": queue.Queue.get,
        "ThreadPoolExecutor.submit": concurrent.futures.ThreadPoolExecutor.submit,
        "Future.result": concurrent.futures.Future.result,
        "Pool.apply_async": multiprocessing.pool.Pool.apply_async,
        "AsyncResult.get": multiprocessing.pool.ApplyResult.get,
    }.items()
}
"""Functions of Python's that give work to another thread or process, or wait for what it does."""
_OF_THREADS = frozenset({"threading", "queue", "concurrent.futures.thread", "concurrent.futures._base",
                         "multiprocessing.pool"})  # fmt: skip


class AskedOutside:
    """What was asked so far; called with the events of a profile hook.

    Attributes:
        variables: names of variables of the process that were looked up, ``EVERY_VARIABLE`` for all of them.
        places: what else was asked, each as ``time.time (model.py:12)``.
        threads: where work went to another thread, or was waited for: ``Future.result (model.py:12)``.
    """

    def __init__(self) -> None:
        self.variables: set[str] = set()
        self.places: dict[str, None] = {}
        self.threads: dict[str, None] = {}

    def call(self, frame: types.FrameType) -> None:
        """A function of Python's begins."""
        if frame.f_code is ONE_VARIABLE:
            name = frame.f_locals.get("key")
            self.variables.add(os.fsdecode(name) if isinstance(name, bytes) else str(name))
        elif frame.f_code is ALL_VARIABLES:
            self.variables.add(EVERY_VARIABLE)
        elif frame.f_code in _THREADS and (where := _asked_at(frame.f_back, _OF_THREADS)):
            self.threads[f"{_THREADS[frame.f_code]} ({where})"] = None

    def builtin(self, frame: types.FrameType, function: PyObject) -> None:
        """``frame`` calls a builtin."""
        if not _asks(function):
            return
        if where := _asked_at(frame, _HELPERS):
            self.places[f"{_name(function)} ({where})"] = None


def _asked_at(frame: types.FrameType | None, helpers: frozenset[str]) -> str:
    """The user's line that asks, through modules that are ``helpers``; "" where it is no code of the user's."""
    at = frame
    while at is not None and at.f_globals.get("__name__") in helpers:
        at = at.f_back
    if at is None or foreign(str(at.f_globals.get("__name__"))):
        return ""
    return f"{at.f_code.co_filename.rpartition('/')[2]}:{at.f_lineno}"


def _name(function: PyObject) -> str:
    owner = function.__self__
    if isinstance(owner, types.ModuleType):
        module = {"_io": "", "io": "", "posix": "os.", "nt": "os."}.get(owner.__name__, f"{owner.__name__}.")
        return f"{module}{function.__name__}"
    return f"{(owner if isinstance(owner, type) else type(owner)).__name__}.{function.__name__}"


def _asks(function: PyObject) -> bool:
    """Whether a builtin tells what no code and no module holds."""
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if isinstance(owner, types.ModuleType):
        return name in _ASKS.get(owner.__name__, ())
    if isinstance(owner, type):
        return name in _NOW and issubclass(owner, datetime.date)
    return any(isinstance(owner, cls) and name in names for cls, names in _OF_OBJECTS)

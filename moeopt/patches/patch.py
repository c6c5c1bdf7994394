"""What every patch is made of: a change to the process that is counted, locked and taken back.

The first caller inside puts the change in force, the last caller out takes it back, in whatever order threads come and
go. Where the caller's own thread only must see the change, the patch asks a thread-local mark (:class:`Mine`), so that
a thread that serves an engine meanwhile sees the library as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from moeopt.value_types import PyObject

Undo = Callable[[], None]


class Patch:
    """A change to the process that is in force while at least one caller is inside.

    Args:
        install: puts the change in force and returns what takes it back.
    """

    def __init__(self, install: Callable[[], Undo]) -> None:
        self._install, self._lock = install, threading.RLock()
        self._inside, self._undo = 0, nothing

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._undo = self._install()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo()


class Mine(threading.local):
    """A stack of values of the current thread: what a patched function does for the threads that asked for it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []

    @contextlib.contextmanager
    def holding(self, value: PyObject) -> Iterator[None]:
        self.stack.append(value)
        try:
            yield
        finally:
            self.stack.pop()

    @property
    def top(self) -> PyObject:
        return self.stack[-1] if self.stack else None


def nothing() -> None:
    pass


class InForce:
    """Whether a replacement is in force: one that another library still calls on to does nothing any more."""

    yes = True


def replace(owner: PyObject, name: str, make: Callable[[Any, InForce], Any]) -> Undo:
    """Put ``make(present attribute, whether it is in force)`` in the place of an attribute of a class or module.

    What another library put there meanwhile stays, and calls on to ours.
    """
    held, in_force = vars(owner)[name], InForce()
    ours = make(held, in_force)
    setattr(owner, name, ours)

    def undo() -> None:
        in_force.yes = False
        if vars(owner).get(name) is ours:
            setattr(owner, name, held)

    return undo

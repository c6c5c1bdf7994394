"""What an object prepares at first use: a copy of it may be made before it can."""

from __future__ import annotations

from typing import Protocol

from moeopt.value_types import PyObject


class Prepares(Protocol):
    """An object that sets its prepared attributes once it is asked for one."""

    def _prepare(self) -> None:
        """Set them all."""


class PreparedAttribute:
    """One such attribute; none of an object that has no ``program`` yet.

    A ``__getattr__`` in its place makes every attribute of its class twice as slow to read.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Prepares | None, kind: type) -> PyObject:
        if owner is None or "program" not in owner.__dict__:
            raise AttributeError(self.name)
        try:
            owner._prepare()
        except Exception:  # of a module that was changed: what can't be made is missed where it is read
            if self.name not in owner.__dict__:
                raise
        return owner.__dict__[self.name]

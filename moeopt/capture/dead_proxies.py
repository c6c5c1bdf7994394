"""Weak proxies whose object is gone, as a model that a trainer let go may hold: even ``isinstance`` raises for one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from moeopt.value_types import PyObject

_MOST = 4096
"""Items of one container that are looked at: more are data."""


class Gone:
    """Stands for such a proxy: using it raises as well, looking at its class does not."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ReferenceError("weakly-referenced object no longer exists")


@contextlib.contextmanager
def set_aside(model: nn.Module, *, for_good: bool = False) -> Iterator[None]:
    """While open, such proxies are ``Gone`` in the attributes of modules, and in lists and dicts that these hold.

    Args:
        for_good: whether they stay that afterwards, as in a model that is changed itself. Copies made meanwhile do.
    """
    found = [place for module in model.modules() for place in _dead(module.__dict__, 2)]
    for table, key, _ in found:
        table[key] = Gone()
    try:
        yield
    finally:
        for table, key, value in () if for_good else found:
            table[key] = value


def _dead(table: PyObject, depth: int) -> Iterator[tuple[PyObject, PyObject, PyObject]]:
    """The container, the key and the proxy of each."""
    for key, value in list(table.items() if type(table) is dict else enumerate(table)):  # other threads may write
        if _is_dead(value):
            yield table, key, value
        elif depth and type(value) in (dict, list) and len(value) <= _MOST:
            yield from _dead(value, depth - 1)


def _is_dead(value: PyObject) -> bool:
    if type(value) not in weakref.ProxyTypes:
        return False
    try:
        return value.__class__ is None
    except ReferenceError:
        return True

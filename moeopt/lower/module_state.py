"""Values at the top of the Python modules in which a layer's code is written.

A model may tell its layers something beside their arguments: ``CURRENT.layer = n``, ``state.WINDOW = 8``, a context
variable. A layer is stamped only while these values are what they were when the first of its kind ran, whether that one
reads them or not. A list that code has appended to since is as it was. What lies deeper (an object in an object in a
list, the closure of a function) is not looked at.
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
from contextvars import ContextVar
from typing import Any

from torch import nn

from moeopt.lower.layer_calls import PLAIN
from moeopt.rewrite.code import foreign
from moeopt.rewrite.walk_ambient import bare_lookup
from moeopt.value_types import PyObject

DEPTH = 2
"""So many steps from a module: to an object, and to what its attribute holds."""
MOST = 64
"""Of a longer container the first items are looked at, and the length."""


class _Itself:
    """An object that is equal to itself alone."""

    def __init__(self, held: PyObject) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._held is other._held

    __hash__ = None  # type: ignore[assignment]


class _List:
    """The first items of a list; equal to a later one that begins with them: code that appends writes a log."""

    def __init__(self, words: list[Any]) -> None:
        self._words = words

    def __eq__(self, later: object) -> bool:
        return isinstance(later, _List) and self._words == later._words[: len(self._words)]

    __hash__ = None  # type: ignore[assignment]


def module_state(layer: nn.Module) -> list[Any]:
    """The values, as words: ``earlier == later`` while the values are what they were."""
    names = {c.__module__ for module in layer.modules() for c in type(module).__mro__}
    own = [vars(sys.modules[n]) for n in sorted(names) if n in sys.modules and not foreign(n)]
    return [
        (name, _word(value, DEPTH)) for table in own for name, value in list(table.items()) if not name.startswith("__")
    ]


def _word(value: PyObject, depth: int) -> PyObject:
    if isinstance(value, PLAIN):
        return type(value), repr(value) if isinstance(value, float) else value
    if not depth:
        return _Itself(value)
    if isinstance(value, ContextVar):
        return _Itself(value), _word(value.get(None), depth)
    if isinstance(value, dict):
        pairs = itertools.islice(list(value.items()), MOST)
        return _Itself(value), len(value), [(_word(k, 0), _word(v, depth - 1)) for k, v in pairs]
    if type(value) is list:
        return _Itself(value), _List([_word(v, depth - 1) for v in value[:MOST]])
    if isinstance(value, (list, tuple, set, frozenset)):
        return _Itself(value), len(value), [_word(v, depth - 1) for v in itertools.islice(list(value), MOST)]
    return _Itself(value), [(name, _word(held, depth - 1)) for name, held in list(_table(value).items())]


def _table(value: PyObject) -> dict[str, Any]:
    """The attributes of an object of the user's, or the names of a module of the user's."""
    cls = type(value)
    if cls is types.ModuleType:
        return {} if foreign(value.__name__) else dict(vars(value))
    open_to_all = issubclass(cls, (types.SimpleNamespace, threading.local))
    if isinstance(value, (type, nn.Module)) or (foreign(cls.__module__) and not open_to_all):
        return {}
    try:
        found = bare_lookup(cls)(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}

"""The values that a layer's code can read beside its arguments and weights: in modules, closures, shared objects.

A model may tell its layers something beside their arguments: ``CURRENT.layer = n``, ``state.WINDOW = 8``, a context
variable, a variable of an enclosing function, ``self.config.window = 8``. A layer is stamped only while these values
are what they were when the first of its kind ran, whether that one reads them or not. A list that code has appended
to since is as it was. What no table shows (an iterator, what a library keeps) is not looked at: :mod:`.layer_runs`
sees what comes of it.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from moeopt.lower.layer_calls import PLAIN, Same
from moeopt.lower.plain_attributes import is_watching
from moeopt.rewrite.code import foreign
from moeopt.rewrite.walk_ambient import bare_lookup
from moeopt.value_types import PyObject

MOST_OBJECTS = 10_000
"""Code that can reach more has a state that is never what it was: its layers are traced each."""
DEEPEST = 64
"""Steps from one object to the next, beyond which it is the same."""
MOST_ITEMS = 64
"""Of a longer container the first items are looked at, and the length."""
_CONTAINERS = (list, tuple, set, frozenset)
_MODULES_OWN = frozenset({*vars(nn.Module()), "forward"})
"""Attributes of every module: alike layers have no hooks, and one function ``forward`` or what is put on each."""


class _List:
    """The first items of a list; equal to a later one that begins with them: code that appends writes a log."""

    def __init__(self, words: list[Any]) -> None:
        self._words = words

    def __eq__(self, later: object) -> bool:
        return isinstance(later, _List) and self._words == later._words[: len(self._words)]

    __hash__ = None  # type: ignore[assignment]


def module_state(layer: nn.Module) -> list[Any]:
    """The values, as words: ``earlier == later`` while the values are what they were."""
    every = {c for module in layer.modules() for c in type(module).__mro__}
    classes = {c for c in every if not foreign(c.__module__) and not is_watching(c)}
    names = sorted({c.__module__ for c in classes} & sys.modules.keys())
    reached = _Reached(set(names))
    tables = [sorted(vars(sys.modules[name]).items()) for name in names]
    words = [(key, reached.word(value)) for table in tables for key, value in table if not key.startswith("__")]
    words += [reached.word(c) for c in sorted(classes, key=lambda c: (c.__module__, c.__qualname__))]
    words += [reached.word(value) for value in _shared_objects(layer)]
    return words if reached.count <= MOST_OBJECTS else [object()]


def _shared_objects(layer: nn.Module) -> Iterator[Any]:
    """What the attributes of a layer's modules hold, but for plain values, tensors, and containers themselves.

    Alike layers hold equal containers of their own, and else the same objects (:mod:`moeopt.capture.alike`).
    """
    todo = [v for module in layer.modules() for n, v in module.__dict__.items() if n not in _MODULES_OWN]
    for value in todo:
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, _CONTAINERS):
            todo += value
        elif not isinstance(value, (*PLAIN, torch.Tensor, nn.Module)):
            yield value


class _Reached:
    """The objects that were looked at, each once; ``count`` of them.

    Args:
        names: the Python modules whose classes are looked into.
    """

    def __init__(self, names: set[str]) -> None:
        self.count, self._depth = 0, 0
        self._names = names
        self._seen: set[int] = set()

    def word(self, value: PyObject) -> PyObject:
        """A value as one that is equal to a later one's while all that can be reached from it is what it was."""
        self._depth += 1
        try:
            return self._word(value)
        finally:
            self._depth -= 1

    def _word(self, value: PyObject) -> PyObject:
        if isinstance(value, PLAIN):
            return type(value), repr(value) if isinstance(value, float) else value
        if self._depth > DEEPEST:  # a list of objects that name the next one: too much to look at
            self.count = MOST_OBJECTS + 1
        if id(value) in self._seen or self.count > MOST_OBJECTS:
            return Same(value)
        self._seen.add(id(value))
        self.count += 1
        if type(value) is list:
            return Same(value), _List([self.word(v) for v in value[:MOST_ITEMS]])
        if isinstance(value, _CONTAINERS):
            return Same(value), len(value), [self.word(v) for v in itertools.islice(list(value), MOST_ITEMS)]
        if isinstance(value, dict):
            pairs = itertools.islice(list(value.items()), MOST_ITEMS)
            return Same(value), len(value), [(self.word(k), self.word(v)) for k, v in pairs]
        return Same(value), [(name, self.word(held)) for name, held in self._parts(value)]

    def _parts(self, value: PyObject) -> list[tuple[str, Any]]:
        """What an object holds that code may change, by name."""
        if isinstance(value, ContextVar):
            return [("value", value.get(None))]
        if isinstance(value, nn.Module):
            return [(name, held) for name, held in value.__dict__.items() if isinstance(held, PLAIN)]
        if isinstance(value, types.ModuleType):
            return self._of_module(value)
        if isinstance(value, types.FunctionType):
            return _of_function(value)
        if isinstance(value, types.MethodType):
            return [("self", value.__self__), ("function", value.__func__)]
        if isinstance(value, functools.partial):
            return [("function", value.func), ("args", value.args), ("keywords", value.keywords)]
        if isinstance(value, property):
            return [("get", value.fget)]
        if isinstance(value, (staticmethod, classmethod)):
            return [("function", value.__func__)]
        if isinstance(value, type):
            return [(n, v) for n, v in vars(value).items() if n[:2] != "__"] if value.__module__ in self._names else []
        return _of_object(value)

    def _of_module(self, module: types.ModuleType) -> list[tuple[str, Any]]:
        """The names of a Python module of the user's; of an installed one those of plain values."""
        if foreign(module.__name__):
            return []
        file = getattr(module, "__file__", None) or ""
        library = module.__name__ not in self._names and ("site-packages" in file or "dist-packages" in file)
        table = [(n, v) for n, v in list(vars(module).items()) if not n.startswith("__")]
        return [(n, v) for n, v in table if isinstance(v, PLAIN)] if library else table


def _of_function(function: types.FunctionType) -> list[tuple[str, Any]]:
    """The variables of enclosing functions, the defaults and the attributes of a function of the user's."""
    if foreign(function.__module__ or ""):
        return []
    cells: list[tuple[str, Any]] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            cells.append((name, None))
    return [*cells, ("defaults", function.__defaults__), ("keywords", function.__kwdefaults__), *vars(function).items()]


def _of_object(value: PyObject) -> list[tuple[str, Any]]:
    """The attributes of an object of the user's, in its table and in slots."""
    cls = type(value)
    if foreign(cls.__module__) and not issubclass(cls, (types.SimpleNamespace, threading.local)):
        return []
    lookup = bare_lookup(cls)
    try:
        table = lookup(value, "__dict__")
    except AttributeError:
        table = {}
    slots = [name for c in cls.__mro__ for name, v in vars(c).items() if isinstance(v, types.MemberDescriptorType)]
    held = list(table.items()) if isinstance(table, dict) else []
    for name in slots:
        try:
            held.append((name, lookup(value, name)))
        except AttributeError:  # not set
            continue
    return held

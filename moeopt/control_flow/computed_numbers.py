"""Numbers that a block's code computes from numbers, where it compares: ``if len(x) > self.side ** 2``.

The bytecode holds a 2 and the module a 40, and the branch turns at 1600 tokens. So the source of each method is read
for what it compares, takes the least of, counts to or slices with, and such an expression of attributes of the module,
globals and constants is computed. What the source cannot tell (a size of the input, a call) is no number.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import textwrap
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeopt.capture.held_contents import foreign
from moeopt.value_types import PyObject

_OPS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.LShift: operator.lshift,
}  # fmt: skip
_LARGEST = 1 << 53
_BOUNDING = ("min", "max", "range", "split", "chunk", "narrow")
_DEPTH = 4
"""Of methods that call methods."""


def computed_numbers(module: nn.Module) -> set[int]:
    """The whole numbers in question, of ``module`` and its submodules."""
    found: set[int] = set()
    for each in module.modules():
        for function in _methods(type(each)):
            source = _source(function)
            if source.bounding:
                found |= _Values(each, source).bounding()
    return found


def _methods(cls: type) -> Iterator[types.FunctionType]:
    """What the user's own classes among those of ``cls`` define."""
    for own in (c for c in cls.__mro__ if not foreign(c.__module__)):
        for function in vars(own).values():
            if isinstance(function, types.FunctionType) and function.__name__ != "__init__":
                yield function


@dataclass(frozen=True)
class _Source:
    """What is read of one method.

    Attributes:
        names: its globals.
        locals: what names are that are assigned once.
        bounding: expressions in what it compares, counts to or slices with.
        result: what it returns at its end.
    """

    names: Mapping[str, Any]
    locals: Mapping[str, ast.expr]
    bounding: tuple[ast.expr, ...]
    result: ast.expr | None


_SOURCES: weakref.WeakKeyDictionary[types.FunctionType, _Source] = weakref.WeakKeyDictionary()


def _source(function: types.FunctionType) -> _Source:
    if function not in _SOURCES:
        _SOURCES[function] = _read(function)
    return _SOURCES[function]


def _read(function: types.FunctionType) -> _Source:
    names: Mapping[str, Any] = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source: typed in, or compiled
        return _Source(names, {}, (), None)
    assigned: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            assigned[name] = ast.Constant(None) if name in assigned else node.value
    inner = [node for part in _compared(tree) for node in ast.walk(part)]
    bounding = [
        n for n in inner if isinstance(n, (ast.BinOp, ast.Call)) or isinstance(n, ast.Name) and n.id in assigned
    ]
    last = tree.body[-1] if isinstance(tree, ast.FunctionDef) else None
    return _Source(names, assigned, tuple(bounding), last.value if isinstance(last, ast.Return) else None)


class _Unknown(Exception):
    """An expression of more than numbers."""


class _Values:
    """Values of expressions in one method of ``module``."""

    def __init__(self, module: nn.Module, source: _Source, depth: int = _DEPTH) -> None:
        self.module, self.source, self.depth = module, source, depth

    def bounding(self) -> set[int]:
        """The whole numbers among what the method compares with."""
        found = set()
        for node in self.source.bounding:
            try:
                value = self._of(node, 8)
            except Exception:  # of the user's numbers too: a division by zero, a shift below zero
                continue
            if isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < _LARGEST:
                found.add(int(value))
        return found

    def _of(self, node: ast.expr, depth: int) -> PyObject:
        """The number, string or object that ``node`` stands for."""
        if not depth:
            raise _Unknown
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._named(node.id, depth)
        if isinstance(node, ast.Attribute):
            return _plain_attribute(self._of(node.value, depth - 1), node.attr)
        if isinstance(node, ast.BinOp):
            return self._computed(node, depth)
        if isinstance(node, ast.Call) and not node.keywords:
            return self._called(node, depth)
        raise _Unknown

    def _named(self, name: str, depth: int) -> PyObject:
        if name == "self":
            return self.module
        if name in self.source.locals:
            return self._of(self.source.locals[name], depth - 1)
        return self.source.names[name]

    def _computed(self, node: ast.BinOp, depth: int) -> PyObject:
        a, b = self._of(node.left, depth - 1), self._of(node.right, depth - 1)
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            raise _Unknown
        if isinstance(node.op, ast.Pow):
            return a**b if abs(b) <= 16 and abs(a) < _LARGEST else None
        return _OPS[type(node.op)](a, b) if not isinstance(node.op, ast.LShift) or 0 <= b < 53 else None

    def _called(self, node: ast.Call, depth: int) -> PyObject:
        """``len`` of what a module holds, ``int`` of a number, and a method of the module's that is one expression."""
        if isinstance(node.func, ast.Name) and node.func.id in ("len", "int", "round") and len(node.args) == 1:
            value = self._of(node.args[0], depth - 1)
            return len(value) if node.func.id == "len" else int(value)
        if not (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)) or not self.depth:
            raise _Unknown
        method = getattr(type(self.module), node.func.attr, None) if node.func.value.id == "self" else None
        source = _source(method) if isinstance(method, types.FunctionType) and not node.args else None
        if source is None or source.result is None:
            raise _Unknown
        return _Values(self.module, source, self.depth - 1)._of(source.result, depth - 1)


def _compared(tree: ast.AST) -> Iterator[ast.expr]:
    """What decides by its size."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.Slice):
            yield from (part for part in (node.lower, node.upper, node.step) if part is not None)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield from node.args if name in _BOUNDING else ()


def _plain_attribute(value: PyObject, name: str) -> PyObject:
    """What is held under ``name``, with no code run: no property."""
    tables = [vars(value), getattr(value, "_modules", {}), *(vars(c) for c in type(value).__mro__)]
    return next(table[name] for table in tables if name in table)

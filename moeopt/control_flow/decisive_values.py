"""The values that decide a condition in Python code: numbers, lists and tensors in its source, as a frame holds them.

``len(set(ids.tolist())) == 1`` may be False in every call, while its operand ``len(set(ids.tolist()))`` differs from
call to call. So the source of a condition is searched from the outside in, until values other than bools are found.
Only expressions without side effects are evaluated again: built-in functions, methods of tensors and of containers.
"""

from __future__ import annotations

import ast
import builtins
import collections
import contextlib
import itertools
import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional
from torch import Tensor, nn

from moeopt.control_flow.branches_taken import Position
from moeopt.value_types import PyObject

Decisive = tuple[ast.expr, Any]
"""An operand of a condition, and a hashable fingerprint of its value."""

_BUILTINS = "len int float bool set frozenset list tuple dict sorted max min sum any all abs range str round".split()
_PURE = tuple(getattr(builtins, name) for name in _BUILTINS)
CONTAINERS = (list, tuple, set, frozenset, dict, range, str, int, float, bool, torch.Size)
_MODULES = (torch, torch.nn.functional, np, math)
_HELD = frozenset("count index keys values items get union intersection difference isdisjoint issubset".split())
_EFFECTS = (
    "rand",
    "normal",
    "bernoulli",
    "multinomial",
    "manual",
    "set_",
    "save",
    "load",
    "empty",
    "backward",
    "register",
)
_OF_TYPES = frozenset("isinstance issubclass hasattr callable type is_tensor id".split())
"""Functions whose results do not depend on values."""
_FIELDS = (types.MemberDescriptorType, types.GetSetDescriptorType, type(collections.namedtuple("_", "a").a))  # type: ignore[attr-defined]
"""Descriptors of slots, of built-in classes and of named tuples: reading them runs no code of the user's."""
_METHODS = (types.FunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, staticmethod, classmethod)
_LARGEST = 1 << 16
_DEPTH = 12
_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Not: operator.not_, ast.USub: operator.neg,
    ast.Invert: operator.invert, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


class Results(int):
    """The number of tensors in a list."""


class Unknown(Exception):
    """The value of an expression cannot be looked up without running code that may have side effects."""


@dataclass(frozen=True)
class Scope:
    """The names that a frame can read.

    Attributes:
        local, world: the frame's local and global names.
        assigned: for each name that the frame's function assigns once, the assigned expression.
        returned: gives the result of a function of the user's, by the position of the call.
    """

    local: Mapping[str, Any]
    world: Mapping[str, Any]
    assigned: Mapping[str, ast.expr]
    returned: Callable[[Position], Any]

    def decisive(self, node: ast.expr, depth: int = _DEPTH) -> Iterator[Decisive]:
        """The values in ``node`` that are no bools, from the outside in."""
        if not depth or isinstance(node, (ast.Constant, ast.Lambda)):
            return
        try:
            value = self.value(node)
        except Unknown:
            value = self.returned(position(node))
            value = True if value is None else value
        except Exception:  # evaluating it may fail in the user's own way: a key that is not there yet
            return
        held = fingerprint(value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len":
            with contextlib.suppress(Exception):
                results = fingerprint(self.value(node.args[0]))
                held = results if isinstance(results, Results) else held
        if held is not None:
            yield node, held
        elif isinstance(value, (bool, np.bool_, Iterator)):
            for part in self._parts(node):
                yield from self.decisive(part, depth - 1)

    def _parts(self, node: ast.expr) -> Iterator[ast.expr]:
        """The expressions from which the bool ``node`` is computed."""
        if isinstance(node, ast.Name):
            if node.id in self.assigned:
                yield self.assigned[node.id]
        elif isinstance(node, ast.Compare):
            if not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
                yield from (node.left, *node.comparators)
        elif isinstance(node, ast.Call):
            yield from self._of_call(node)
        elif isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
            yield from (one.iter for one in node.generators)
        elif isinstance(node, ast.Subscript):
            yield from (node.value, node.slice)
        elif not isinstance(node, ast.Attribute):
            yield from (part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))

    def _of_call(self, node: ast.Call) -> Iterator[ast.expr]:
        """The expressions that decide the result of a call; none for the user's functions, whose code is watched."""
        name = called(node)
        if name in _OF_TYPES or (name.startswith("is_") and name != "is_nonzero"):
            return
        try:
            self._function(node.func)
        except Exception:
            if not isinstance(node.func, ast.Name) or not hasattr(builtins, name):
                return
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
        yield from node.args

    def value(self, node: ast.expr) -> PyObject:
        """The value of ``node``.

        Raises:
            Unknown: evaluating it may have side effects.
        """
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.NamedExpr):
            return self.value(node.value)
        if isinstance(node, ast.Attribute):
            return _attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return self._item(self.value(node.value), node.slice)
        if isinstance(node, ast.Starred):
            many = self.value(node.value)
            if not isinstance(many, (Tensor, np.ndarray)) and type(many) not in CONTAINERS:
                raise Unknown
            return many
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            made = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
            parts = [self.value(one) if isinstance(one, ast.Starred) else [self.value(one)] for one in node.elts]
            return made(itertools.chain(*parts))
        return self._computed(node)

    def _computed(self, node: ast.expr) -> PyObject:
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            parts = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.operand,)
            return self._operation(node.op, *map(self.value, parts))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self._operation(node.ops[0], self.value(node.left), self.value(node.comparators[0]))
        if isinstance(node, ast.Call):
            keywords = {k.arg: self.value(k.value) for k in node.keywords if k.arg is not None}
            if "out" in keywords or len(keywords) < len(node.keywords):
                raise Unknown
            args = [*map(self.value, node.args)]
            if any(isinstance(arg, Iterator) for arg in (*args, *keywords.values())):
                raise Unknown  # an iterator can be consumed once, and the user's code needs its items
            return self._function(node.func)(*args, **keywords)
        raise Unknown

    def _named(self, name: str) -> PyObject:
        for names in (self.local, self.world, vars(builtins)):
            if name in names:
                return names[name]
        raise Unknown

    def _item(self, held: PyObject, at: ast.expr) -> PyObject:
        key = self._key(at)
        if not isinstance(held, (Tensor, np.ndarray)) and type(held) not in CONTAINERS:
            raise Unknown
        return held[key]

    def _key(self, at: ast.expr) -> PyObject:
        if isinstance(at, ast.Slice):
            return slice(*(None if part is None else self.value(part) for part in (at.lower, at.upper, at.step)))
        if isinstance(at, ast.Tuple) and not any(isinstance(part, ast.Starred) for part in at.elts):
            return tuple(map(self._key, at.elts))
        return self.value(at)

    def _operation(self, op: ast.AST, *values: PyObject) -> PyObject:
        plain = (*CONTAINERS, np.generic, np.ndarray, Tensor, torch.dtype, torch.device, torch.Size, type(None))
        if type(op) not in _OPERATORS or not all(isinstance(v, plain) for v in values):
            raise Unknown
        return _OPERATORS[type(op)](*values)

    def _function(self, node: ast.expr) -> Callable[..., Any]:
        """The called function, where it has no side effect."""
        if isinstance(node, ast.Name):
            found = self._named(node.id)
            if not any(found is one for one in _PURE) and not _of_torch(found, node.id):
                raise Unknown
            return found  # type: ignore[no-any-return]
        if not isinstance(node, ast.Attribute) or _has_effects(node.attr):
            raise Unknown
        of = self.value(node.value)
        array = isinstance(of, (Tensor, np.ndarray, np.generic)) or any(of is module for module in _MODULES)
        if not array and not (type(of) in CONTAINERS and node.attr in _HELD):
            raise Unknown
        return getattr(of, node.attr)  # type: ignore[no-any-return]


def position(node: ast.AST) -> Position:
    """The position of a node in its source."""
    return (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def called(node: ast.Call) -> str:
    """The name of the called function; "" where it has none."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _has_effects(name: str) -> bool:
    return name.endswith("_") or name.startswith(_EFFECTS)


def _of_torch(found: PyObject, name: str) -> bool:
    return (
        isinstance(found, types.BuiltinFunctionType) and getattr(torch, name, None) is found and not _has_effects(name)
    )


def _attribute(of: PyObject, name: str) -> PyObject:
    """The attribute ``name`` of an object, read without running code of the user's, such as a property."""
    if isinstance(of, (Tensor, np.ndarray)) or any(of is module for module in _MODULES):
        return getattr(of, name)
    tables = [getattr(of, "__dict__", {})]
    if isinstance(of, nn.Module):
        tables += [of._buffers, of._parameters, of._modules]
    tables += [vars(c) for c in type(of).__mro__]
    found = next((table[name] for table in tables if name in table), Unknown)
    if type(found) in _FIELDS:
        return getattr(of, name)
    if found is Unknown or (hasattr(type(found), "__get__") and not isinstance(found, _METHODS)):
        raise Unknown  # a property or another descriptor, which would run the user's code
    return found


def fingerprint(value: PyObject) -> PyObject:
    """A hashable value that is equal for equal values; None for bools and for values without numbers or text."""
    if isinstance(value, (bool, np.bool_, type(None))):
        return None
    if isinstance(value, (int, float, str, np.generic)):
        return value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()[:_LARGEST]
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        return Results(len(value))
    if isinstance(value, (list, tuple, set, frozenset, range)):
        parts = [repr(fingerprint(v) if not isinstance(v, bool) else v) for v in list(value)[:_LARGEST]]
        return len(value), tuple(sorted(parts) if isinstance(value, (set, frozenset)) else parts)
    return None


def _of_tensor(value: Tensor) -> PyObject:
    if value.layout != torch.strided or value.is_meta or value.numel() > _LARGEST:
        return None
    if value.numel() == 1 and not value.dtype.is_floating_point and value.dtype != torch.bool:
        return value.item()
    return tuple(value.shape), hash(value.detach().reshape(-1).double().cpu().numpy().tobytes())

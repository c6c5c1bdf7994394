"""What the operands of a model's Python were in one call: numbers, text and tuples of them, by the expression.

The lines of the model's code are watched with ``sys.settrace``; before a line runs, the operands in it are looked up in
the frame, or computed again where that has no effect. No tensor is computed again but for its shape.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.capture.held_contents import foreign
from moeopt.pipeline.decisive_values import Scope, Unknown
from moeopt.pipeline.size_uses import Item, Use, called, uses_in
from moeopt.value_types import PyObject

UNKNOWN = "?"
"""Begins what is known of an operand that cannot be looked up: the parts of it that can."""

_LIBRARIES = ("/numpy/", "/einops/")
_SIZES = frozenset("size numel nelement dim ndimension stride item tolist".split())
_SHAPES = frozenset("shape ndim".split())
_SCRIPTS = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
_MOST = 64
"""Numbers of a tuple that are compared."""
_ASKS = ("COMPARE_OP", "CONTAINS_OP", "BINARY_OP", "BINARY_MODULO", "BINARY_FLOOR_DIVIDE", "BINARY_AND")
_ASSERTS = {"torch", "_assert", "size", "shape", "numel"}


class _IsTensor(Exception):
    """An expression that is a tensor: what is made of it is on the tape."""


class _SizeScope(Scope):
    """Names as a frame holds them; what is a tensor is not computed."""

    def value(self, node: ast.expr) -> PyObject:
        if isinstance(node, ast.Name) and node.id not in self.local and node.id in self.assigned:
            return self.value(self.assigned[node.id])
        if isinstance(node, ast.Attribute) and node.attr in _SHAPES:
            return self.whole().value(node)
        return super().value(node)

    def _computed(self, node: ast.expr) -> PyObject:
        if isinstance(node, ast.Call):
            if called(node) == "len" or called(node) in _SIZES:
                return self.whole().value(node)
            function = self._function(node.func)
            if function is torch.Size:
                return torch.Size(self.value(node.args[0]))
            of = getattr(function, "__self__", None)
            if isinstance(of, Tensor) or str(getattr(function, "__module__", None) or "torch").startswith("torch"):
                raise _IsTensor
        return super()._computed(node)

    def _item(self, held: PyObject, at: ast.expr) -> PyObject:
        if isinstance(held, Tensor):
            raise _IsTensor
        return super()._item(held, at)

    def _operation(self, op: ast.AST, *values: PyObject) -> PyObject:
        if any(isinstance(v, Tensor) for v in values):
            raise _IsTensor
        return super()._operation(op, *values)

    def whole(self) -> Scope:
        """The same, by which tensors are computed as well."""
        return Scope(self.local, self.world, self.assigned, self.returned)


class SizeValues:
    """The values of one call.

    Attributes:
        values: of each operand, by its number.
        orders: digests of the same in the order of the call.
        returned: what functions of the model's gave, by their names.
        ran: names of these functions.
        unread: places of code whose source is not to be had, and that may compute with sizes.
        unresolved: calls of what is not known: of the model's, if a function of that name ran.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[Use, int], set[Any]] = {}
        self.orders: dict[tuple[Use, int], int] = {}
        self.returned: dict[str, set[Any]] = {}
        self.ran: set[str] = set()
        self.unread: set[str] = set()
        self.unresolved: set[Use] = set()
        self._uses: dict[tuple[str, int], dict[int, list[Use]] | None] = {}

    def watching(self, run: Callable[..., Any], *args: PyObject, **kwargs: PyObject) -> PyObject:
        """``run(*args, **kwargs)``, watched."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return run(*args, **kwargs)
        finally:
            sys.settrace(before)

    def _enter(self, frame: types.FrameType, event: str, _: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if foreign(str(frame.f_globals.get("__name__"))) or any(part in code.co_filename for part in _LIBRARIES):
            return None
        self.ran.add(code.co_name)
        place = code.co_filename, code.co_firstlineno
        if place not in self._uses:
            self._uses[place] = uses_in(*place)
        uses = self._uses[place]
        if uses is None and _may_ask(code):
            self.unread.add(f"{code.co_filename}:{code.co_firstlineno}")

        def inside(frame: types.FrameType, event: str, arg: PyObject) -> Callable[..., Any]:
            if event == "line" and uses is not None:
                for use in uses.get(frame.f_lineno, ()):
                    try:
                        self._look(use, frame)
                    except Exception:  # noqa: BLE001  it would end the user's own call, and the watching with it
                        self.unread.add(f"{code.co_filename}:{frame.f_lineno}")
            elif event == "return" and (value := _plain(arg)) is not None:
                self.returned.setdefault(code.co_name, set()).add(value)
            return inside

        return inside

    def _look(self, use: Use, frame: types.FrameType) -> None:
        scope = _SizeScope(frame.f_locals, frame.f_globals, use.assigned, lambda _: None)
        values = [_value_of(scope, operand) for operand in use.operands]
        function = _resolved(scope, use.node.func) if isinstance(use.node, ast.Call) else None
        if isinstance(function, _SCRIPTS) and "prim::If" in str(function.graph):
            self.unread.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        if any(value is Tensor for value in values) or _followed(use, scope, function):
            return
        if function is int and use.kind == "call" and all(isinstance(value, int) for value in values):
            return  # it stays as it is
        if function is Unknown:
            self.unresolved.add(use)
        for number, value in enumerate(values):
            if value is not None:
                key = (use, number)
                self.values.setdefault(key, set()).add(value)
                self.orders[key] = hash((self.orders.get(key), value))


def _value_of(scope: _SizeScope, node: ast.expr) -> PyObject:
    """What an operand is; ``Tensor`` for a tensor, None for what is no number, text or tuple of these."""
    if isinstance(node, ast.Constant):
        return _plain(node.value)
    if isinstance(node, Item):
        with contextlib.suppress(Exception):
            held = scope.whole().value(node.value)
            held = _plain(held.item() if isinstance(held, Tensor) and not held.dim() else held)
            return None if held is Tensor else held
        return None
    try:
        return _plain(scope.value(node))
    except _IsTensor:
        return Tensor
    except Unknown:
        parts = [part for child in ast.iter_child_nodes(node) for part in _parts(scope, child)]
        return (UNKNOWN, *parts[:_MOST])
    except Exception:  # of the user's numbers too: a name that is not assigned yet
        return None


def _parts(scope: _SizeScope, node: ast.AST) -> Iterator[Any]:
    """What can be looked up of a part of an operand: numbers, text, and how often a tensor is gone through."""
    if isinstance(node, ast.comprehension):
        with contextlib.suppress(Exception):
            yield len(scope.whole().value(node.iter))
    if isinstance(node, ast.expr):
        value = _value_of(scope, node)
        if value is not None and value is not Tensor:
            yield value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _parts(scope, child)


def _plain(value: PyObject) -> PyObject:
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, np.number):
        return value.item()
    if isinstance(value, range):
        return value
    if isinstance(value, (list, tuple, set, frozenset, Mapping)) and len(value) <= _MOST:
        parts = [_plain(part) for part in value]
        if any(part is None or part is Tensor for part in parts):
            return None
        return tuple(sorted(parts, key=repr)) if isinstance(value, (set, frozenset)) else tuple(parts)
    return None


def _followed(use: Use, scope: _SizeScope, function: PyObject) -> bool:
    """Whether what takes the operands is PyTorch's, and so on the tape, or the user's, and so looked at itself."""
    if use.kind == "clip":  # of a tuple (x.shape[:-1]) there are as many in every call
        return _resolved(scope, use.node.value) is not Tensor  # type: ignore[attr-defined]
    if use.kind == "lookup" and isinstance(use.node, ast.Subscript):
        held = _resolved(scope, use.node.value)
        return held is Tensor or (held is Unknown and isinstance(use.node.slice, (ast.Slice, ast.Tuple)))
    if not isinstance(use.node, ast.Call):
        return False
    name = called(use.node)
    if function is Tensor or (function is Unknown and isinstance(use.node.func, ast.Attribute)):
        return hasattr(Tensor, name)
    own = isinstance(function, (type, types.FunctionType, types.MethodType)) and not foreign(function.__module__ or "")
    if own or isinstance(function, nn.Module):
        return True
    return str(getattr(function, "__module__", None) or "").startswith("torch") or any(
        getattr(module, name, None) is function for module in (torch, nn.functional)
    )


def _resolved(scope: _SizeScope, node: ast.expr) -> PyObject:
    """What ``node`` is; ``Tensor`` for a tensor or a method of one, ``Unknown`` for what is not known."""
    try:
        value = scope.value(node)
    except _IsTensor:
        return Tensor
    except Exception:
        if isinstance(node, ast.Attribute) and _resolved(scope, node.value) is Tensor:
            return Tensor
        return Unknown
    of = getattr(value, "__self__", None)
    return Tensor if isinstance(value, Tensor) or isinstance(of, Tensor) else value


def _may_ask(code: types.CodeType) -> bool:
    """Whether code asks for sizes and computes with anything, for all that its names and instructions tell."""
    if not {"shape", "size", "numel", "nelement", "len"} & {*code.co_names}:
        return False
    steps = [*dis.get_instructions(code)]
    return any(step.opname in _ASKS for step in steps) and not _only_asserts(code, steps)


def _only_asserts(code: types.CodeType, steps: list[dis.Instruction]) -> bool:
    """Whether code decides between an error and nothing, as what torch.export writes out of a program's guards."""
    ends = [
        (before, step) for before, step in itertools.pairwise(steps) if step.opname in ("RETURN_VALUE", "RETURN_CONST")
    ]
    gives_none = all((step if step.opname == "RETURN_CONST" else before).argval is None for before, step in ends)
    stores = any(step.opname.startswith("STORE_") for step in steps)
    return "_assert" in code.co_names and {*code.co_names} <= _ASSERTS and gives_none and not stores

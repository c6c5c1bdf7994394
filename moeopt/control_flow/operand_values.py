"""What an operand in a model's source is, in a frame that runs it: a number, text, a tuple of these, or a tensor.

Names are looked up, and what has no effect is computed again; of tensors only their sizes, and what Python is given of
one. What functions gave that the frame called is known by the place of the call. Of an operand that none of this tells
the parts are known that can be looked up, and the sizes of tensors that were given to code which nothing tells of.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.control_flow.branches_taken import Position
from moeopt.control_flow.decisive_values import CONTAINERS, Scope, Unknown, called, position
from moeopt.control_flow.operand_facts import MOST, UNKNOWN, is_own, is_torch, plain
from moeopt.control_flow.size_uses import FOLLOWED, Item, SizesOf
from moeopt.value_types import PyObject

_ASKING = frozenset(
    "size numel nelement dim ndimension stride item tolist numpy element_size storage_offset untyped_storage "
    "storage nbytes broadcast_shapes __len__ __array__ __getattribute__ __length_hint__".split()
)
"""Methods of tensors and of their storages, and functions, that give no tensor."""
_SHAPES = frozenset("shape ndim nbytes itemsize".split())
_MADE = frozenset("int float bool len list tuple set sorted sum min max any all range str round abs".split())
"""Python's own functions, which make no tensor of one or of many."""
_GONE_THROUGH = frozenset("enumerate zip reversed list tuple".split())
"""Those of ``FOLLOWED`` whose results tell how many there are of what they are given, and no more of a tensor."""
COLUMNS = hasattr(types.CodeType, "co_positions")
"""Whether Python tells at which of a line's calls it is: from 3.11 on."""
_GIVING = (ast.Call, ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.Compare)
"""Expressions that are what a function returned which was called for them."""
_CALLS = ("__call__", "_wrapped_call_impl")
"""Functions behind the call of an object, and of a module."""
_STORAGES = (torch.UntypedStorage, torch.TypedStorage)


class _IsTensor(Exception):
    """An expression that is a tensor: what is made of it is on the tape."""


@dataclass(frozen=True)
class _Whole(Scope):
    """Names as a frame holds them, and what the functions returned that it called.

    Attributes:
        came_back: the name of the last function that was called at a position, and what it returned.
    """

    came_back: Mapping[Position, tuple[str, Any]]

    def value(self, node: ast.expr) -> PyObject:
        try:
            return super().value(node)
        except Unknown:
            name, held = self.came_back.get(position(node), ("", None)) if isinstance(node, _GIVING) else ("", None)
            if held is None or isinstance(held, Iterator) or not self._gave(node, name):
                raise
            return held

    def _gave(self, node: ast.expr, name: str) -> bool:
        """Whether what ``name`` returned at the place of ``node`` is its value: a function of Python's own, as ``map``,
        calls others there for purposes of its own."""
        if not isinstance(node, ast.Call):
            return True
        if name == f"__{called(node)}__" or (called(node), name) == ("eval", "<module>"):
            return True  # len(of what has a __len__), or code in a text
        try:
            function = self.value(node.func)
        except Exception:
            return called(node) in ("", name) or name in _CALLS
        function = getattr(function, "func", function)  # of a partial
        kinds = (types.FunctionType, types.MethodType)
        if inspect.isgeneratorfunction(function):
            return False  # what came back is one of what it yields
        return isinstance(function, kinds) or isinstance(_looked_up(function, "__call__"), kinds)

    def _item(self, held: PyObject, at: ast.expr) -> PyObject:
        if type(held) in (nn.ModuleList, nn.ModuleDict, nn.Sequential):
            return held[self.value(at)]
        return super()._item(held, at)

    def _function(self, node: ast.expr) -> Callable[..., Any]:
        if isinstance(node, ast.Attribute) and node.attr in _ASKING:
            of = self.value(node.value)
            if isinstance(of, (Tensor, np.ndarray, *_STORAGES)) or isinstance(of, type) and issubclass(Tensor, of):
                return getattr(of, node.attr)  # type: ignore[no-any-return]
        elif not isinstance(node, ast.Attribute):
            found = self.value(node)
            bound = isinstance(getattr(found, "__self__", None), Tensor) and found.__name__ in _ASKING
            if found is getattr or found is type or bound:
                return found  # type: ignore[no-any-return]
        return super()._function(node)


class SizeScope(_Whole):
    """The same, in which what is a tensor is not computed."""

    def value(self, node: ast.expr) -> PyObject:
        if isinstance(node, ast.Name) and node.id not in self.local and node.id in self.assigned:
            return self.value(self.assigned[node.id])
        if isinstance(node, ast.Attribute) and node.attr in _SHAPES:
            return self.whole().value(node)
        return super().value(node)

    def _computed(self, node: ast.expr) -> PyObject:
        if not isinstance(node, ast.Call):
            return super()._computed(node)
        name = called(node)
        if name in _ASKING or name.startswith("sym_"):
            return self.whole().value(node)
        function = self._function(node.func)
        if getattr(function, "__name__", "") in _ASKING:
            return self.whole().value(node)
        if function is torch.Size:
            return torch.Size(self.value(node.args[0]))
        if function is getattr:  # of others it may be code of the user's
            if not isinstance(self.value(node.args[0]), Tensor):
                raise Unknown
            return self.whole().value(node)
        of = getattr(function, "__self__", None)
        held = type(of) in CONTAINERS or isinstance(of, (np.ndarray, np.generic))
        if not held and str(getattr(function, "__module__", None) or "torch").startswith("torch"):
            raise _IsTensor
        try:
            return super()._computed(node)
        except _IsTensor:
            if name not in _MADE or getattr(builtins, name) is not function:
                raise
        return self.whole().value(node)

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
        return _Whole(self.local, self.world, self.assigned, self.returned, self.came_back)

    def resolved(self, node: ast.expr) -> PyObject:
        """What ``node`` is; ``Tensor`` for a tensor or a method of one, ``Unknown`` for what is not known."""
        try:
            value = self.value(node)
        except _IsTensor:
            return Tensor
        except Exception:
            if isinstance(node, ast.Attribute) and self.resolved(node.value) is Tensor:
                return Tensor
            return Unknown
        of = getattr(value, "__self__", None)
        return Tensor if isinstance(value, Tensor) or isinstance(of, Tensor) else value


def operand_value(scope: SizeScope, node: ast.expr) -> PyObject:
    """What an operand is; ``Tensor`` for a tensor, None for what is no number, text or tuple of these."""
    if isinstance(node, ast.Constant):
        return plain(node.value)
    if isinstance(node, SizesOf):
        return _sizes(scope, node.value)
    if isinstance(node, Item):
        with contextlib.suppress(Exception):
            held = scope.whole().value(node.value)
            value = plain(held.item() if isinstance(held, Tensor) and not held.dim() else held)
            if value is None and isinstance(held, (list, tuple)):  # of tensors
                return len(held)
            return None if value is Tensor else value
        return None
    try:
        return plain(scope.value(node))
    except _IsTensor:
        return Tensor
    except Unknown:
        inside = getattr(node, "generators", None) or ast.iter_child_nodes(node)  # a turn's code is looked at itself
        parts = [part for child in inside for part in _parts(scope, child)]
        return (UNKNOWN, *parts[:MOST], *_given(scope, node))
    except Exception:  # of the user's numbers too: a name that is not assigned yet
        return None


def _looked_up(held: PyObject, name: str) -> PyObject:
    """What the classes of ``held`` have under ``name``."""
    return next((vars(kind)[name] for kind in type(held).__mro__ if name in vars(kind)), None)


def _parts(scope: SizeScope, node: ast.AST) -> Iterator[Any]:
    """What can be looked up of a part of an operand: numbers, text, and how often a tensor is gone through."""
    if isinstance(node, ast.comprehension):
        with contextlib.suppress(Exception):
            yield len(scope.whole().value(node.iter))
    if isinstance(node, ast.expr):
        value = operand_value(scope, node)
        if value is not None and value is not Tensor:
            yield value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _parts(scope, child)


def _given(scope: SizeScope, node: ast.AST) -> list[Any]:
    """The sizes of tensors that code was given which nothing tells of (neither PyTorch's nor the user's: what is behind
    a partial, an iterator, an extension), or that ``node`` asks for their sizes; of all that the frame holds where it
    is not known which are asked."""
    asked: list[ast.expr] = []
    if isinstance(node, ast.Attribute) and node.attr in _SHAPES:
        asked = _names(node.value)
    elif isinstance(node, ast.Call):
        held = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        if called(node) in _ASKING:
            asked = [name for one in (*held, *node.args) for name in _names(one)]
        elif called(node) == "eval":
            asked = [node.func]
        elif called(node) in _GONE_THROUGH:
            return [count for one in node.args if (count := _count(scope, one)) is not None]
        elif called(node) not in FOLLOWED:
            function = scope.resolved(node.func)
            makes_tensor = function is Unknown and held and hasattr(Tensor, called(node))
            known = is_torch(function) and not getattr(function, "__name__", "").startswith("sym_")
            known = known or isinstance(function, nn.Module) or _is_looked_at(scope, node, function)
            if not (makes_tensor or known):
                return _all_sizes(scope, [*held, *node.args, *(k.value for k in node.keywords)])
    found = _all_sizes(scope, asked)
    if asked and not found:
        return [tuple(one.shape) for one in scope.local.values() if isinstance(one, Tensor)][:MOST]
    return found


def _is_looked_at(scope: SizeScope, node: ast.Call, function: PyObject) -> bool:
    """Whether a function, or a class, is the user's, and what it gives is told by its own code: neither under another
    name, nor something to be gone through, as often as a tensor has rows, say."""
    if not is_own(function) or inspect.isgeneratorfunction(function):
        return False
    if isinstance(function, type) and (hasattr(function, "__iter__") or hasattr(function, "__getitem__")):
        return False
    if position(node) not in scope.came_back:
        return COLUMNS and getattr(function, "__name__", "") == called(node)
    return not isinstance(scope.came_back[position(node)][1], Iterator)


def _all_sizes(scope: SizeScope, nodes: list[ast.expr]) -> list[Any]:
    return [sizes for one in nodes if (sizes := _sizes(scope, one)) is not None]


def _count(scope: SizeScope, node: ast.expr) -> PyObject:
    """How many there are of what ``node`` is, or of each where it stands for several; None where nothing tells."""
    with contextlib.suppress(Exception):
        held = scope.whole().value(node.value if isinstance(node, ast.Starred) else node)
        return tuple(map(len, held))[:MOST] if isinstance(node, ast.Starred) else len(held)
    return None


def _names(node: ast.expr) -> list[ast.expr]:
    return [part for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute))]


def _sizes(scope: SizeScope, node: ast.expr) -> PyObject:
    """Those of the tensor that ``node`` is, or of several; None for all else."""
    try:
        held = scope.whole().value(node.value if isinstance(node, ast.Starred) else node)
    except Exception:
        return None
    if isinstance(held, _STORAGES):
        return held.nbytes()
    many = held if isinstance(held, (list, tuple)) else [held]
    shapes = tuple(tuple(one.shape) for one in many[:MOST] if isinstance(one, (Tensor, np.ndarray)))
    return shapes or None

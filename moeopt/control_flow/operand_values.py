"""The value of an operand in a model's source, in the frame that runs it: a number, text, a tuple of these, a tensor.

A name is looked up in the frame, and an expression without side effects is evaluated again. Of a tensor only its sizes
are read, and the numbers that Python reads from it (``x.item()``). The result of a call is known where the trace saw
the function return. For an operand that stays unknown, the parts that can be looked up are recorded in its place, and
the sizes of the tensors that were passed to code which is not watched.
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
from moeopt.control_flow.operand_facts import MOST, UNKNOWN, is_torch, is_users, plain
from moeopt.control_flow.size_uses import FOLLOWED, Item, SizesOf
from moeopt.value_types import PyObject

_READING_NUMBERS = frozenset(
    "size numel nelement dim ndimension stride item tolist numpy element_size storage_offset untyped_storage "
    "storage nbytes broadcast_shapes __len__ __array__ __getattribute__ __length_hint__".split()
)
"""Methods of tensors and storages, and functions, that return numbers to Python and no tensor."""
_SHAPES = frozenset("shape ndim nbytes itemsize".split())
_MADE = frozenset("int float bool len list tuple set sorted sum min max any all range str round abs".split())
"""Built-in functions that return no tensor, whatever tensors they are given."""
_ITERATING = frozenset("enumerate zip reversed list tuple".split())
"""Functions of ``FOLLOWED`` of which only the number of items matters: they iterate over their arguments."""
COLUMNS = hasattr(types.CodeType, "co_positions")
"""Whether code objects hold columns, so that two calls on one line can be told apart: from Python 3.11 on."""
_MAY_CALL = (ast.Call, ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.Compare)
"""Expressions whose value a function of the user's may have returned: a call, or an operator's method."""
_CALLS = ("__call__", "_wrapped_call_impl")
"""Names of the functions that run when an object, or a module, is called."""
_STORAGES = (torch.UntypedStorage, torch.TypedStorage)


class _IsTensor(Exception):
    """The expression is a tensor, so the operations on it are on the tape already."""


@dataclass(frozen=True)
class _Whole(Scope):
    """The names of a frame, and what the functions that the frame called returned.

    Attributes:
        came_back: by the position of a call, the name of the function that returned last, and its result.
    """

    came_back: Mapping[Position, tuple[str, Any]]

    def value(self, node: ast.expr) -> PyObject:
        try:
            return super().value(node)
        except Unknown:
            name, held = self.came_back.get(position(node), ("", None)) if isinstance(node, _MAY_CALL) else ("", None)
            if held is None or isinstance(held, Iterator) or not self._returned_for(node, name):
                raise
            return held

    def _returned_for(self, node: ast.expr, name: str) -> bool:
        """Whether the value that ``name`` returned at the position of ``node`` is the value of ``node``.

        A built-in such as ``map`` calls the user's functions at the same position, and their results are not its own.
        """
        if not isinstance(node, ast.Call):
            return True
        if name == f"__{called(node)}__" or (called(node), name) == ("eval", "<module>"):
            return True  # len() of an object with __len__, or eval() of a text
        try:
            function = self.value(node.func)
        except Exception:
            return called(node) in ("", name) or name in _CALLS
        function = getattr(function, "func", function)  # of a partial
        kinds = (types.FunctionType, types.MethodType)
        if inspect.isgeneratorfunction(function):
            return False  # the value that came back is one of the items that it yields
        return isinstance(function, kinds) or isinstance(_looked_up(function, "__call__"), kinds)

    def _item(self, held: PyObject, at: ast.expr) -> PyObject:
        if type(held) in (nn.ModuleList, nn.ModuleDict, nn.Sequential):
            return held[self.value(at)]
        return super()._item(held, at)

    def _function(self, node: ast.expr) -> Callable[..., Any]:
        if isinstance(node, ast.Attribute) and node.attr in _READING_NUMBERS:
            of = self.value(node.value)
            if isinstance(of, (Tensor, np.ndarray, *_STORAGES)) or isinstance(of, type) and issubclass(Tensor, of):
                return getattr(of, node.attr)  # type: ignore[no-any-return]
        elif not isinstance(node, ast.Attribute):
            found = self.value(node)
            bound = isinstance(getattr(found, "__self__", None), Tensor) and found.__name__ in _READING_NUMBERS
            if found is getattr or found is type or bound:
                return found  # type: ignore[no-any-return]
        return super()._function(node)


class SizeScope(_Whole):
    """A scope in which tensors are not computed: an expression that is a tensor raises ``_IsTensor``."""

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
        if name in _READING_NUMBERS or name.startswith("sym_"):
            return self.whole().value(node)
        function = self._function(node.func)
        if getattr(function, "__name__", "") in _READING_NUMBERS:
            return self.whole().value(node)
        if function is torch.Size:
            return torch.Size(self.value(node.args[0]))
        if function is getattr:  # on an object other than a tensor, it may run code of the user's
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
        """The scope in which tensors are computed as well."""
        return _Whole(self.local, self.world, self.assigned, self.returned, self.came_back)

    def resolved(self, node: ast.expr) -> PyObject:
        """The value of ``node``; ``Tensor`` for a tensor or its method, ``Unknown`` where it cannot be looked up."""
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
    """The value of an operand: numbers, text or a tuple of these; ``Tensor`` for a tensor, None for anything else."""
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
        inside = getattr(node, "generators", None) or ast.iter_child_nodes(
            node
        )  # the body of a comprehension is watched by itself
        parts = [part for child in inside for part in _parts(scope, child)]
        return (UNKNOWN, *parts[:MOST], *_sizes_passed(scope, node))
    except Exception:  # evaluating it may fail in the user's own way: a name that is not assigned yet
        return None


def _looked_up(held: PyObject, name: str) -> PyObject:
    """The attribute ``name`` of the classes of ``held``, looked up without running descriptors."""
    return next((vars(kind)[name] for kind in type(held).__mro__ if name in vars(kind)), None)


def _parts(scope: SizeScope, node: ast.AST) -> Iterator[Any]:
    """The known values in a part of an operand: numbers, text, and how many items a comprehension iterates over."""
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


def _sizes_passed(scope: SizeScope, node: ast.AST) -> list[Any]:
    """The sizes of the tensors that ``node`` passes to code which is not watched, or whose sizes it reads.

    Code is not watched where it is neither PyTorch's nor the user's: behind a partial, an iterator, an extension. Where
    no tensor among the names of ``node`` can be looked up, every tensor of the frame counts.
    """
    asked: list[ast.expr] = []
    if isinstance(node, ast.Attribute) and node.attr in _SHAPES:
        asked = _names(node.value)
    elif isinstance(node, ast.Call):
        held = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        if called(node) in _READING_NUMBERS:
            asked = [name for one in (*held, *node.args) for name in _names(one)]
        elif called(node) == "eval":
            asked = [node.func]
        elif called(node) in _ITERATING:
            return [count for one in node.args if (count := _count(scope, one)) is not None]
        elif called(node) not in FOLLOWED:
            function = scope.resolved(node.func)
            makes_tensor = function is Unknown and held and hasattr(Tensor, called(node))
            known = is_torch(function) and not getattr(function, "__name__", "").startswith("sym_")
            known = known or isinstance(function, nn.Module) or _is_watched(scope, node, function)
            if not (makes_tensor or known):
                return _all_sizes(scope, [*held, *node.args, *(k.value for k in node.keywords)])
    found = _all_sizes(scope, asked)
    if asked and not found:
        return [tuple(one.shape) for one in scope.local.values() if isinstance(one, Tensor)][:MOST]
    return found


def _is_watched(scope: SizeScope, node: ast.Call, function: PyObject) -> bool:
    """Whether ``function`` is the user's and is watched by itself, so that its arguments need not be recorded here.

    Not so where the call names it otherwise, and where it returns an iterator: how often that is advanced is decided
    by whoever iterates.
    """
    if not is_users(function) or inspect.isgeneratorfunction(function):
        return False
    if isinstance(function, type) and (hasattr(function, "__iter__") or hasattr(function, "__getitem__")):
        return False
    if position(node) not in scope.came_back:
        return COLUMNS and getattr(function, "__name__", "") == called(node)
    return not isinstance(scope.came_back[position(node)][1], Iterator)


def _all_sizes(scope: SizeScope, nodes: list[ast.expr]) -> list[Any]:
    return [sizes for one in nodes if (sizes := _sizes(scope, one)) is not None]


def _count(scope: SizeScope, node: ast.expr) -> PyObject:
    """The length of ``node``, or of each part of a starred ``node``; None where it has none."""
    with contextlib.suppress(Exception):
        held = scope.whole().value(node.value if isinstance(node, ast.Starred) else node)
        return tuple(map(len, held))[:MOST] if isinstance(node, ast.Starred) else len(held)
    return None


def _names(node: ast.expr) -> list[ast.expr]:
    return [part for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute))]


def _sizes(scope: SizeScope, node: ast.expr) -> PyObject:
    """The sizes of the tensor ``node``, or of each tensor in a list; None for anything else."""
    try:
        held = scope.whole().value(node.value if isinstance(node, ast.Starred) else node)
    except Exception:
        return None
    if isinstance(held, _STORAGES):
        return held.nbytes()
    many = held if isinstance(held, (list, tuple)) else [held]
    shapes = tuple(tuple(one.shape) for one in many[:MOST] if isinstance(one, (Tensor, np.ndarray)))
    return shapes or None

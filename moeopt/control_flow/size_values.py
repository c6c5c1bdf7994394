"""The values of the operands in a model's Python during one call: numbers, text and tuples of these, by expression.

``sys.settrace`` watches the lines of the model's code. Before a line runs, its operands are looked up in the frame, or
evaluated again where that has no side effect (:mod:`moeopt.control_flow.operand_values`). An operand that needs the
result of a call on the same line is looked up again after the line.
"""

from __future__ import annotations

import ast
import dis
import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.held_contents import foreign
from moeopt.control_flow.branches_taken import Position, call_places
from moeopt.control_flow.decisive_values import Unknown, called, position
from moeopt.control_flow.operand_facts import is_torch, is_unknown, is_users, plain
from moeopt.control_flow.operand_values import SizeScope, operand_value
from moeopt.control_flow.size_uses import Use, lines_that_catch, uses_in
from moeopt.control_flow.watched_call import watched_call
from moeopt.value_types import PyObject

_LIBRARIES = ("/numpy/", "/einops/")
_SCRIPTS = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
_SIZED = {"shape", "size", "numel", "nelement", "len", "__len__", "nbytes", "itemsize", "stride", "untyped_storage"}
_ASKS = ("COMPARE_OP", "CONTAINS_OP", "BINARY_OP", "BINARY_MODULO", "BINARY_FLOOR_DIVIDE", "BINARY_AND")
_ASSERTS = {"torch", "_assert", "size", "shape", "numel"}


class SizeValues:
    """The values of one call.

    Attributes:
        values: by expression and number of the operand, the values that it had.
        orders: digests of the same values in the order of the call.
        returned: by name, the results of the model's functions.
        ran: the names of the model's functions that ran.
        unread: places of code without source that may compute with sizes.
        unresolved: calls of an unknown function: the model's, if a function of that name ran.
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
        return watched_call(self._enter, run, *args, **kwargs)

    def _enter(self, frame: types.FrameType, event: str, _: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if foreign(str(frame.f_globals.get("__name__"))) or any(part in code.co_filename for part in _LIBRARIES):
            if _watched(frame.f_back) is None:
                return None
            frame.f_trace_lines = False
            return _Returns()
        self.ran.add(code.co_name)
        place = code.co_filename, code.co_firstlineno
        if place not in self._uses:
            self._uses[place] = uses_in(*place)
        uses = self._uses[place]
        if uses is None and _may_read_sizes(code):
            self.unread.add(f"{code.co_filename}:{code.co_firstlineno}")
        return _FrameOperands(self, uses or {})

    def look(self, use: Use, scope: SizeScope, place: str, again: bool) -> bool:
        """Record the operands of ``use``; False where calls on the line must return first, unless this is ``again``."""
        values = [operand_value(scope, operand) for operand in use.operands]
        function = scope.resolved(use.node.func) if isinstance(use.node, ast.Call) else None
        if not again and (function is Unknown or any(map(is_unknown, values))):
            return False
        if isinstance(function, _SCRIPTS) and "prim::If" in str(function.graph):
            self.unread.add(place)
        if any(value is Tensor for value in values) or _is_watched_elsewhere(use, scope, function):
            return True
        if function is int and use.kind == "call" and all(isinstance(value, int) for value in values):
            return True  # int() of an int is that int
        if function is Unknown:
            self.unresolved.add(use)
        for number, value in enumerate(values):
            if value is not None:
                key = (use, number)
                self.values.setdefault(key, set()).add(value)
                self.orders[key] = hash((self.orders.get(key), value))
        return True


class _Returns:
    """The trace function of a frame of other code that the model's code called."""

    def __call__(self, frame: types.FrameType, event: str, arg: PyObject) -> _Returns:
        caller = _watched(frame.f_back)
        name = frame.f_code.co_name
        ended = arg is None and frame.f_code.co_flags & inspect.CO_GENERATOR
        if event == "return" and caller is not None and frame.f_back is not None and not ended:
            at = call_places(frame.f_back.f_code).get(frame.f_back.f_lasti, ())
            caller.came_back[at] = name, arg
        return self


class _FrameOperands(_Returns):
    """The trace function of a frame of the model's code."""

    def __init__(self, into: SizeValues, uses: dict[int, list[Use]]) -> None:
        self._into, self._uses = into, uses
        self._again: list[tuple[Use, SizeScope, str]] = []
        self.came_back: dict[Position, tuple[str, Any]] = {}

    def __call__(self, frame: types.FrameType, event: str, arg: PyObject) -> _FrameOperands:
        if event in ("line", "return"):
            for use, scope, place in self._again:
                self._look(use, scope, place, True)
            self._again = []
        if event == "line":
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            for use in self._uses.get(frame.f_lineno, ()):
                if use.owner in ("", frame.f_code.co_name) and (not use.erring or _is_caught(frame)):
                    world = frame.f_globals
                    scope = SizeScope(frame.f_locals, world, use.assigned, lambda _: None, self.came_back)
                    if not self._look(use, scope, place, False):
                        kept = replace(scope, local=dict(frame.f_locals))
                        self._again.append((use, kept, place))
        elif event == "return":
            if (value := plain(arg)) is not None:
                self._into.returned.setdefault(frame.f_code.co_name, set()).add(value)
            super().__call__(frame, event, arg)
        return self

    def _look(self, use: Use, scope: SizeScope, place: str, again: bool) -> bool:
        try:
            return self._into.look(use, scope, place, again)
        except Exception:  # noqa: BLE001  an error here would end the user's own call
            self._into.unread.add(place)
            return True


def _watched(frame: types.FrameType | None) -> _FrameOperands | None:
    inside = frame.f_trace if frame is not None else None
    return inside if isinstance(inside, _FrameOperands) else None


def _is_caught(frame: types.FrameType) -> bool:
    """Whether the model's code catches an error that is raised in ``frame``."""
    at: types.FrameType | None = frame
    while at is not None:
        if _watched(at) is not None and at.f_lineno in lines_that_catch(
            at.f_code.co_filename, at.f_code.co_firstlineno
        ):
            return True
        at = at.f_back
    return False


def _is_watched_elsewhere(use: Use, scope: SizeScope, function: PyObject) -> bool:
    """Whether the operands go to PyTorch, whose ops are on the tape, or to code of the user's, which is watched."""
    if use.kind == "lookup" and isinstance(use.node, ast.Subscript):
        held = scope.resolved(use.node.value)
        return held is Tensor or (held is Unknown and isinstance(use.node.slice, (ast.Slice, ast.Tuple)))
    if not isinstance(use.node, ast.Call) or use.kind in ("shapes", "split"):
        return False
    if isinstance(scope.came_back.get(position(use.node), ("", None))[1], Tensor):  # as sum of many
        return True
    name = called(use.node)
    if function is Tensor or (function is Unknown and isinstance(use.node.func, ast.Attribute)):
        return hasattr(Tensor, name)
    asks = name.startswith("sym_")  # as min and max of sizes
    return is_users(function) or isinstance(function, nn.Module) or is_torch(function) and not asks


def _may_read_sizes(code: types.CodeType) -> bool:
    """Whether code reads sizes and computes with something, judged by its names and instructions."""
    if not _SIZED & {*code.co_names}:
        return False
    steps = [*dis.get_instructions(code)]
    return any(step.opname in _ASKS for step in steps) and not _only_asserts(code, steps)


def _only_asserts(code: types.CodeType, steps: list[dis.Instruction]) -> bool:
    """Whether code does nothing but raise errors, as the guards that torch.export generates for a program."""
    ends = [
        (before, step) for before, step in itertools.pairwise(steps) if step.opname in ("RETURN_VALUE", "RETURN_CONST")
    ]
    gives_none = all((step if step.opname == "RETURN_CONST" else before).argval is None for before, step in ends)
    stores = any(step.opname.startswith("STORE_") for step in steps)
    return "_assert" in code.co_names and {*code.co_names} <= _ASSERTS and gives_none and not stores

"""Patches of torch that captures and exports run under: module calls, symbolic sizes, moves, the dump of a graph."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moeopt.patches.patch import InForce, Mine, Patch, Undo, replace
from moeopt.value_types import PyObject

_routes = Mine()
one_trace = threading.RLock()
"""Held by whoever traces or exports: torch.export puts ``nn.Module.__call__`` back as it found it, and a trace the
random state, so that two at once would undo each other's."""


def _route_calls() -> Undo:
    from torch import nn

    def make(call: PyObject, in_force: InForce) -> PyObject:
        def routed_call(module: PyObject, *args: PyObject, **kwargs: PyObject) -> PyObject:
            route = _routes.top if in_force.yes else None
            return call(module, *args, **kwargs) if route is None else route(call, module, args, kwargs)

        return routed_call

    return replace(nn.Module, "__call__", make)


_routed = Patch(_route_calls)


@contextlib.contextmanager
def module_calls(route: Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """While open, each ``nn.Module`` call of this thread is ``route(original call, module, args, kwargs)``."""
    with one_trace, _routed(), _routes.holding(route):
        yield


_notes, _answers = Mine(), Mine()


def _note_questions() -> Undo:
    from torch.fx.experimental.sym_node import SymNode

    def make(original: PyObject, in_force: InForce) -> PyObject:
        def bool_(self: PyObject) -> bool:
            told: bool | None = _answers.top(self) if in_force.yes and _answers.top is not None else None
            if told is not None:
                return told
            answer: bool = original(self)
            if in_force.yes and _notes.top is not None:
                _notes.top(self, answer, sys._getframe(1))
            return answer

        return bool_

    def counted(original: PyObject, in_force: InForce) -> PyObject:
        def guard_int(self: PyObject, file: str, line: int) -> int:
            known = in_force.yes and _notes.top is not None and self.expr.is_number
            number: int = original(self, file, line)
            if in_force.yes and _notes.top is not None and not known:
                _notes.top(self, number, sys._getframe(1))
            return number

        return guard_int

    undo = [replace(SymNode, "bool_", make), replace(SymNode, "guard_int", counted)]

    def back() -> None:
        for one in undo:
            one()

    return back


_noted = Patch(_note_questions)


@contextlib.contextmanager
def size_questions(note: Callable[[Any, bool | int, types.FrameType], None]) -> Iterator[None]:
    """While open, ``note(sym_node, answer, asking frame)`` hears of each symbolic size that this thread asks about, and
    of each that it makes a plain number (``range(n)``), torch's C++ included."""
    with _noted(), _notes.holding(note):
        yield


@contextlib.contextmanager
def size_answers(answer: Callable[[Any], bool | None]) -> Iterator[None]:
    """While open, ``answer(sym_node)`` is what this thread's questions about symbolic sizes get, unless it is None.

    torch is not asked then, and the graph holds for both answers.
    """
    with _noted(), _answers.holding(answer):
        yield


_general = Mine()


def _take_general_ways() -> Undo:
    from torch.fx.experimental.sym_node import SymNode
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def make(original: PyObject, in_force: InForce) -> PyObject:
        def guard_bool(self: PyObject, file: str, line: int) -> bool:
            asks = in_force.yes and _general.top is not None and free_unbacked_symbols(self.expr)
            if asks and _leaves_early(self.expr, bool(file)):
                return False
            answer: bool = original(self, file, line)
            return answer

        return guard_bool

    return replace(SymNode, "guard_bool", make)


def _leaves_early(asked: PyObject, of_cpp: bool) -> bool:
    """Whether code of torch itself asks if there is nothing, or, before it raises an error, if there is one."""
    import sympy
    import torch

    if not isinstance(asked, sympy.Eq):
        return False
    if of_cpp:
        return 0 in asked.args
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("bool_", "__bool__", "wrapper", "expect_true"):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(f"{torch.__path__[0]}{os.sep}"):
        return False
    return 0 in asked.args or (1 in asked.args and frame.f_code.co_name in _RAISE)


_RAISE = ("_verify_batch_size", "_verify_spatial_size")
"""Functions of torch that do nothing but raise an error, for a norm of one value."""
_generally = Patch(_take_general_ways)


@contextlib.contextmanager
def general_ways() -> Iterator[None]:
    """While open, code of torch that asks whether a size that data choose is 0 takes the way for any size.

    It asks to leave early, with the empty result that the general way has too; a model's own code is asked elsewhere.
    """
    with _generally(), _general.holding(True):
        yield


_lengths = Mine()


def _length(value: PyObject, /) -> PyObject:
    import torch
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols

    if _lengths.top is not None and isinstance(value, torch.Tensor) and value.dim():
        size = value.shape[0]
        if isinstance(size, torch.SymInt) and not free_unbacked_symbols(size):
            return size  # what is asked of a number that data choose is known by the call of len
        if isinstance(size, torch.SymInt):
            with contextlib.suppress(GuardOnDataDependentSymNode):
                return len(value)
            return size
    return len(value)


def stands_for_builtin(value: PyObject) -> bool:
    """Whether ``value`` is what :func:`free_lengths` puts under a builtin's name for the time of a trace."""
    return value is _length


@contextlib.contextmanager
def free_lengths(code: Iterable[dict[str, Any]]) -> Iterator[None]:
    """While open, ``len(x)`` of a tensor is ``x.shape[0]``, as a trace knows it, in the ``code`` of these globals:
    Python makes a plain number of what ``__len__`` gives, and a free size would be the traced call's.

    The builtin itself stays as it is: traces call it a hundred times as often as a model's code does.
    """
    with one_trace, _lengths.holding(True):
        changed = [names for names in {id(names): names for names in code}.values() if "len" not in names]
        for names in changed:
            names["len"] = _length
        try:
            yield
        finally:
            for names in changed:
                if names.get("len") is _length:
                    del names["len"]


_idle = Mine()


def _keep_idle_moves() -> Undo:
    import torch
    from torch import nn

    def make(original: PyObject, in_force: InForce) -> PyObject:
        def to(self: PyObject, *args: PyObject, **kwargs: PyObject) -> PyObject:
            if _idle.top is None or not in_force.yes:
                return original(self, *args, **kwargs)
            device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
            held = [*self.parameters(), *self.buffers()]
            same = all(
                device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in held
            )
            return self if same and form is None else original(self, *args, **kwargs)

        return to

    return replace(nn.Module, "to", make)


_kept = Patch(_keep_idle_moves)


@contextlib.contextmanager
def idle_moves() -> Iterator[None]:
    """While open, ``module.to(dtype)`` does nothing where the module has that dtype: export cannot trace it."""
    with _kept(), _idle.holding(True):
        yield


def _drop_dumps() -> Undo:
    from torch.export import _trace

    _trace.__dict__["print"] = lambda *args, **kwargs: None
    return lambda: _trace.__dict__.pop("print", None)


no_export_dump = Patch(_drop_dumps)
"""Where export fails, torch prints the whole graph so far; the error says in a sentence what stood in the way."""


_without_cache = Mine()


def _keep_no_results() -> Undo:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def begin(self: PyObject, *args: PyObject, **kwargs: PyObject) -> None:
            theirs(self, *args, **kwargs)
            if in_force.yes and _without_cache.top is not None:
                self.cache_enabled = False

        return begin

    return replace(FakeTensorMode, "__init__", make)


_kept_none = Patch(_keep_no_results)


@contextlib.contextmanager
def no_results_kept() -> Iterator[None]:
    """While open, traces of this thread work out the shape of each result, and look for none in torch's cache.

    Where sizes are free, torch makes each new result twice to see whether the cache may have it; of alike layers one
    is traced, so that few are asked for again. What is traced is the same. (Tiny language models of one to four layers:
    a fifth of the time of their export.)
    """
    with _kept_none(), _without_cache.holding(True):
        yield

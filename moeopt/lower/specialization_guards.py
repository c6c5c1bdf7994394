"""Which questions about sizes the model's own Python asked while it was traced.

``torch.export`` notes every question that was answered, torch's own among them: whether a stride is in order, whether
a size is 1 and may broadcast. Ops of a graph answer those at run time. What ``if x.shape[0] > 1`` chose in the
model's code stays chosen, and so does a ``squeeze`` that found nothing to drop, or the dimension that ``torch.cross``
takes where it is told none (the first one of size 3). What ``range(x.shape[0])`` counted to
stays as often.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.sym_node import SymNode

from moeopt.patches import size_questions
from moeopt.value_types import PyObject

_OWN = str(Path(__file__).parents[1])
"""The rewritten blocks' own checks: what they ask of sizes was verified, and holds for all of them."""
_LIBRARIES = tuple(str(Path(torch.__file__).parents[1] / name) for name in ("torch", "transformers"))
"""Transformers tells one row from many only to build smaller masks; engines are compared at size 1 anyway."""

_ASKED: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
"""For each trace's ShapeEnv, the expressions that the model found to be true."""
_COUNTED: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()
"""For each trace's ShapeEnv, the expressions that the model made plain numbers of, and its lines."""
_SIZE = re.compile(r"L\['(\w+)'\](.*?)\.size\(\)\[(\d+)\]")


@contextlib.contextmanager
def collect_specialization_guards() -> Iterator[None]:
    """Note, while open, each question about sizes that Python code outside the libraries asks."""

    def note(node: SymNode, answer: bool | int, asking: FrameType) -> None:
        asker = _asker(asking)
        if node.shape_env is None:
            return
        if type(answer) is int:  # of whoever asked: a recurrent layer of torch counts its steps
            line = _line_of(asker)
            _COUNTED.setdefault(node.shape_env, {}).setdefault(node._expr, line)  # as it was before
        elif not asker.f_code.co_filename.startswith((_OWN, *_LIBRARIES)):
            import sympy

            expr = node.expr if answer else sympy.Not(node.expr)
            _ASKED.setdefault(node.shape_env, []).append(expr)

    with size_questions(note):
        yield


def _asker(frame: FrameType) -> FrameType:
    """What asked: the frame below ``SymBool.__bool__``, ``SymInt.__index__`` and their like."""
    while frame.f_back is not None and frame.f_code.co_name in ("__bool__", "__index__", "__int__", "int_"):
        frame = frame.f_back
    return frame


def _line_of(frame: FrameType) -> str:
    """The line of the model's own code that asked, by whatever of torch."""
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename.startswith((_OWN, *_LIBRARIES)):
        outer = outer.f_back
    found = outer or frame
    return f"{found.f_code.co_filename}:{found.f_lineno}"


def specialization_guards(program: torch.export.ExportedProgram) -> list[Any]:
    """The expressions over sizes that ``program`` was traced under by its model's own choice."""
    env = _env(program)
    if env is None:
        return []
    import sympy

    kept = [sympy.Ne(size.node.expr, 1) for size in _kept_by_squeeze(program)]
    passed = [sympy.Ne(size.node.expr, 3) for size in _passed_by_cross(program)]
    return [env.replace(expr) for expr in (*_ASKED.get(env, ()), *kept, *passed)]


def counted_sizes(program: torch.export.ExportedProgram) -> list[str]:
    """A note on the sizes of the arguments that are as in the traced call since the model's own code counted to them;
    [] where there are none."""
    env = _env(program)
    told: dict[str, str] = {}
    for expr, line in _COUNTED.get(env, {}).items() if env is not None else ():
        for symbol in sorted(expr.free_symbols, key=str):
            sources = [found for s in env.var_to_sources.get(symbol, ()) if (found := _SIZE.fullmatch(_named(s)))]
            number = env.replace(symbol)
            if sources and number.is_number:
                name, inside, dim = sources[0].groups()
                told.setdefault(f"{name}{inside}.shape[{dim}] == {int(number)}", line)
    if not told:
        return []
    lines = ", ".join(dict.fromkeys(told.values()))
    return [
        f"the engine holds for calls where {' and '.join(told)}, as in the example call: the model's Python makes a "
        f"plain number of this size (at {lines}), as a loop over places, a recurrent layer, int(n), or len(x) in a "
        "function that is no method of a module does (x.shape[0] stays free there). Calls of other sizes are refused; "
        "for them optimise again with example inputs of such sizes, or use backend='torch'"
    ]


def _named(source: PyObject) -> str:
    """How export writes a size; older versions of torch have a method there."""
    return str(source.name() if callable(source.name) else source.name)


def _env(program: torch.export.ExportedProgram) -> PyObject:
    return next(
        (v.fake_mode.shape_env for n in program.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None
    )


def keeps_ones(program: torch.export.ExportedProgram) -> bool:
    """Whether a squeeze of the trace left a size that is 1 in the call that was traced, as it does where 1 is one of
    many values of a free size. Such a trace is another program than the call's."""
    return any(size.node.has_hint() and size.node.hint == 1 for size in _kept_by_squeeze(program))


def _passed_by_cross(program: torch.export.ExportedProgram) -> Iterator[torch.SymInt]:
    """Sizes before the dimension that a ``torch.cross`` without one took, which would be taken where they are 3."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.cross.default and not node.args[2:] and node.kwargs.get("dim") is None:
            for size in node.args[0].meta["val"].shape:
                if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                    yield size
                elif size == 3:
                    break


def _kept_by_squeeze(program: torch.export.ExportedProgram) -> Iterator[torch.SymInt]:
    """Sizes that a squeeze left because they were not 1."""
    for node in program.graph.nodes:
        if node.op != "call_function" or "squeeze" not in str(node.target) or "unsqueeze" in str(node.target):
            continue
        shape = node.args[0].meta["val"].shape
        named = node.args[1] if len(node.args) > 1 else range(len(shape))
        for dim in [named] if isinstance(named, int) else named:
            size = shape[dim]
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                yield size

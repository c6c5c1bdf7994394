"""Which questions about sizes the model's own Python asked while it was traced.

``torch.export`` notes every question that was answered, torch's own among them: whether a stride is in order, whether
a size is 1 and may broadcast. Ops of a graph answer those at run time. What ``if x.shape[0] > 1`` chose in the
model's code stays chosen, and so does a ``squeeze`` that found nothing to drop.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.sym_node import SymNode

from moeopt.patches import size_questions

_OWN = str(Path(__file__).parents[1])
"""The rewritten blocks' own checks: what they ask of sizes was verified, and holds for all of them."""
_LIBRARIES = tuple(str(Path(torch.__file__).parents[1] / name) for name in ("torch", "transformers"))
"""Transformers tells one row from many only to build smaller masks; engines are compared at size 1 anyway."""

_ASKED: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
"""For each trace's ShapeEnv, the expressions that the model found to be true."""


@contextlib.contextmanager
def collect_specialization_guards() -> Iterator[None]:
    """Note, while open, each question about sizes that Python code outside the libraries asks."""

    def note(node: SymNode, answer: bool, asking: FrameType) -> None:
        if node.shape_env is not None and not _asker(asking).startswith((_OWN, *_LIBRARIES)):
            import sympy

            expr = node.expr if answer else sympy.Not(node.expr)
            _ASKED.setdefault(node.shape_env, []).append(expr)

    with size_questions(note):
        yield


def _asker(frame: FrameType) -> str:
    """The file whose line asked: the frame below ``SymBool.__bool__`` and ``SymInt.__bool__``."""
    while frame.f_back is not None and frame.f_code.co_name == "__bool__":
        frame = frame.f_back
    return frame.f_code.co_filename


def specialization_guards(program: torch.export.ExportedProgram) -> list[Any]:
    """The expressions over sizes that ``program`` was traced under by its model's own choice."""
    env = next(
        (v.fake_mode.shape_env for n in program.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None
    )
    if env is None:
        return []
    import sympy

    kept = [sympy.Ne(size.node.expr, 1) for size in _kept_by_squeeze(program)]
    return [env.replace(expr) for expr in (*_ASKED.get(env, ()), *kept)]


def keeps_ones(program: torch.export.ExportedProgram) -> bool:
    """Whether a squeeze of the trace left a size that is 1 in the call that was traced, as it does where 1 is one of
    many values of a free size. Such a trace is another program than the call's."""
    return any(size.node.has_hint() and size.node.hint == 1 for size in _kept_by_squeeze(program))


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

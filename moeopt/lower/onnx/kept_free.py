"""Free sizes stay free while torch's exporter takes ops apart.

A decomposition that makes a plain number of a size (a pool that works out its windows) holds for the size of the call
that was traced. The trace's own questions were noted before; nobody hears of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FrameType

from torch._ops import OpOverload
from torch.fx.experimental.sym_node import SymNode

from moeopt.errors import NotSaveableError
from moeopt.patches import size_questions
from moeopt.value_types import PyObject


@contextlib.contextmanager
def kept_free() -> Iterator[None]:
    """Raises ``NotSaveableError`` at its end, where a plain number was made of a free size while it was open."""
    found: list[str] = []

    def note(node: SymNode, answer: bool | int, asking: FrameType) -> None:
        expr: PyObject = node._expr  # as it was before the answer
        if type(answer) is int and expr.free_symbols:
            found.append(f"{_op_of(asking)} makes a plain number of a free size ({answer} in the call that was traced)")

    with size_questions(note):
        yield
    if found:
        raise NotSaveableError(
            f"the graph has no ONNX form for other sizes: {found[0]} when it is taken apart; use backend='torch', fix "
            "that size, or write that line with other ops"
        )


def _op_of(frame: FrameType | None) -> str:
    """The op that is being taken apart where ``frame`` runs."""
    while frame is not None:
        for name in ("func", "op", "target"):
            if isinstance(found := frame.f_locals.get(name), OpOverload):
                return str(found)
        frame = frame.f_back
    return "an op"

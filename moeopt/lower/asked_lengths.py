"""Where a model's own code asks for the length of something: ``len(x)`` of a tensor is a size, and may be free."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn


def asks_lengths(model: nn.Module) -> list[dict[str, Any]]:
    """The globals of each function of the modules of ``model``, or that one holds, in which ``len`` is called.

    PyTorch's own modules are left out: what these ask of sizes, a trace answers.
    """
    found: dict[int, dict[str, Any]] = {}
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    held = [value for module in model.modules() for value in vars(module).values()]
    for cls in (c for c in classes if c.__module__.split(".")[0] != "torch"):
        held += vars(cls).values()
    for value in held:
        value = value.__func__ if isinstance(value, (MethodType, classmethod, staticmethod)) else value
        if isinstance(value, FunctionType) and any("len" in code.co_names for code in _codes(value.__code__)):
            found[id(value.__globals__)] = value.__globals__
    return list(found.values())


def _codes(code: CodeType) -> Iterator[CodeType]:
    """``code``, and that of the functions and comprehensions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)

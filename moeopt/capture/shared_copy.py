"""A copy of a model that shares every Parameter and buffer with it: other modules, one set of weights."""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

from torch import nn

from moeopt.errors import UsageError

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M) -> M:
    """``copy.deepcopy(model)`` with its tensors kept as they are.

    Raises:
        UsageError: the model holds something that cannot be copied, or a patched ``forward`` that
            would still call the original's children.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as err:
        raise UsageError(
            f"{type(model).__name__} cannot be copied ({type(err).__name__}: {err}), and moeopt works on a copy that "
            "shares the weights; take out what copy.deepcopy cannot copy, or optimise the submodule with the experts"
        ) from err
    own = {id(m) for m in model.modules()}
    for path, module in twin.named_modules():
        for name in ("forward", "_old_forward"):
            if _refers(module.__dict__.get(name), own, 4):
                raise UsageError(
                    f"{name} of {path or type(model).__name__} was replaced by a function that holds on to the "
                    "original module, so a copy would silently run the original's children; undo the patch, optimise, "
                    "and patch again"
                )
    return twin


def _refers(value: Any, modules: set[int], depth: int) -> bool:
    """True where calling ``value`` can reach one of ``modules`` through self, arguments or a closure."""
    if value is None or depth == 0:
        return False
    if isinstance(value, nn.Module):
        return id(value) in modules
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif hasattr(value, "__self__"):
        parts = [value.__self__]
    else:
        cells = getattr(value, "__closure__", None) or ()
        parts = [c.cell_contents for c in cells if _filled(c)]
    return any(_refers(p, modules, depth - 1) for p in parts)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True

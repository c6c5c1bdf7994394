"""Sizes of 1 in an example call, which ``torch.export`` would hold to be fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeopt.bundle.shape_guards import holds
from moeopt.capture.tree import ArgsKwargs
from moeopt.lower.signature import size_conditions
from moeopt.rewrite.whole_model import tried
from moeopt.verification.model import run_plain

Export = Callable[[tuple[Any, ...], dict[str, Any]], torch.export.ExportedProgram]
"""Of the arguments and keyword arguments of a call."""


def export_widened(given: ArgsKwargs, wider: ArgsKwargs, export: Export) -> torch.export.ExportedProgram:
    """What ``export`` makes of the call ``wider``, or of the ``given`` one where that program does not hold for it.

    So it is where the model's code asks whether there is one row, or squeezes that size away.

    Args:
        wider: what :func:`avoid_size_one` made of ``given``.
    """
    program = export(*wider)
    leaves = pytree.tree_leaves(given)
    if holds(size_conditions(program), lambda leaf: leaves[leaf].shape):
        return program
    return export(*given)


def avoid_size_one(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgsKwargs:
    """The same call with two rows where it has one, if the model takes it.

    ``torch.export`` holds a size of 1 to be fixed, so a call with a batch or a sequence of 1 would give an engine
    for exactly that. Nor may a rewritten block hold for a size of 1 alone, and run its original code on two.
    """
    call: ArgsKwargs = (tuple(args), dict(kwargs))
    for axis in (0, 1):
        for along in (True, False):
            wider = _doubled(call, axis, along)
            if wider is None:
                continue
            with tried(model) as refused:
                try:
                    run_plain(model, *wider)
                except Exception:  # whatever stands in the way, the given call is what is exported
                    continue
                if not refused():
                    call = wider
                    break
    return call


def _doubled(call: ArgsKwargs, axis: int, along: bool) -> ArgsKwargs | None:
    """``call`` with two rows along an axis on which all of its tensors have one; None where they do not.

    Args:
        along: tensors without that axis that have an entry for each row of the first one go along: an id or a mark
            for each token of (1, S, H), or of (1, H).
    """
    leaves = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    first = next((t for t in leaves if t.dim() > max(axis, 1)), None)
    if first is None:
        return None
    count = math.prod(first.shape[:-1])

    def has(t: torch.Tensor) -> bool:
        return t.dim() > max(axis, 1) and not goes(t)

    def goes(t: torch.Tensor) -> bool:
        own = t.dim() > max(axis, 1) and t.shape[axis] == 1
        return along and t.dim() > 0 and t.shape[0] == count and not own

    if any(has(t) and t.shape[axis] != 1 for t in leaves) or not any(map(has, leaves)):
        return None
    if along and not any(map(goes, leaves)):
        return None
    doubled: ArgsKwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.cat([t, t], axis if has(t) else 0) if has(t) or goes(t) else t, call
    )
    return doubled

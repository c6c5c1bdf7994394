"""A model as one graph, every size of its tensor inputs free unless the model fixes it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_config
from torch.utils import _pytree as pytree

from moeopt.compare.model import run_plain
from moeopt.errors import MoeoptError, NotSaveableError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def roomier(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The same call with two rows where it has one, if the model takes it.

    ``torch.export`` holds a size of 1 to be fixed, so a call with a batch or a sequence of 1 would give an engine
    for exactly that.
    """
    call: Call = (tuple(args), dict(kwargs))
    for axis in (0, 1):
        leaves = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor) and t.dim() > max(axis, 1)]
        if not leaves or any(t.shape[axis] != 1 for t in leaves):
            continue

        def doubled(t: torch.Tensor, axis: int = axis) -> torch.Tensor:
            return torch.cat([t, t], axis) if t.dim() > max(axis, 1) else t

        wider: Call = pytree.tree_map_only(torch.Tensor, doubled, call)
        try:
            run_plain(model, *wider)
        except Exception:  # whatever stands in the way, the given call is what is exported
            continue
        call = wider
    return call


def export_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """``torch.export`` of ``model`` on a real call.

    Raises:
        NotSaveableError: the model cannot be exported; the message names what is in the way.
    """

    def dynamic(leaf: Any) -> Any:
        return {d: torch.export.Dim.AUTO for d in range(leaf.dim())} if isinstance(leaf, torch.Tensor) else None

    shapes = pytree.tree_map(dynamic, (tuple(args), dict(kwargs)))
    bound = {**dict(zip(inspect.signature(model.forward).parameters, shapes[0], strict=False)), **shapes[1]}
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=bound, strict=False)
    except MoeoptError:
        raise
    except Exception as err:
        text = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise NotSaveableError(
            f"{type(model).__name__} cannot be saved: torch.export stops at: {text}. Blocks that moeopt declined keep "
            "their data-dependent Python; save the rewritten blocks on their own, or remove what it names"
        ) from err

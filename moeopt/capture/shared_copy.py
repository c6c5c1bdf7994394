"""A copy of a model that shares every Parameter and buffer with the original: new modules, one set of weights.

An object that ``copy.deepcopy`` cannot copy (a process group, a lock, a file) is shared too, and the report notes it.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from moeopt.capture.unregistered import unregistered
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

M = TypeVar("M", bound=nn.Module)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def shared_copy(model: M, notes: list[str] | None = None) -> M:
    """``copy.deepcopy(model)`` that shares the tensors.

    Args:
        notes: a list that gets a sentence for each other object that cannot be copied and is shared.

    Raises:
        UsageError: the model holds a module or an iterator that cannot be copied, or a patched ``forward`` that
            would still call the original's children.
    """
    kept: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    kept |= {id(t): t for held in unregistered(model) for t in held.tensors}
    try:
        twin = copy.deepcopy(model, dict(kept))
    except Exception as err:
        shared = _uncopyable(model, kept)
        try:
            twin = copy.deepcopy(model, kept | {id(value): value for value in shared.values()})
        except Exception:
            raise UsageError(
                f"{type(model).__name__} cannot be copied ({type(err).__name__}: {err}), and moeopt works on a copy "
                "that shares the weights; take out what copy.deepcopy cannot copy, or optimise the submodule with the "
                "experts"
            ) from err
        if notes is not None:
            notes += [
                f"{path} ({type(value).__name__}) cannot be copied: the optimised model shares it with the original"
                for path, value in shared.items()
                if not isinstance(value, torch.Tensor)
            ]
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


def _uncopyable(model: nn.Module, kept: dict[int, Any]) -> dict[str, Any]:
    """By path, the objects that cannot be copied and can be shared: attributes, items of containers, parts of objects.

    Tensors that autograd computed (a weight that a hook computes at each call) are among them.
    """
    memo = kept | {id(m): m for m in model.modules()}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in [*module.__dict__.items()]:
            if name not in _REGISTRIES:
                _look(value, f"{path}.{name}" if path else name, memo, found)
    return found


def _look(value: PyObject, path: str, memo: dict[int, Any], found: dict[str, Any]) -> None:
    if id(value) in memo or _copies(value, memo):
        return
    memo[id(value)] = value  # so that an object that refers to itself is visited once
    for name, part in _parts(value):
        _look(part, f"{path}{name}", memo, found)
    del memo[id(value)]
    # two models that shared an iterator would take items from each other
    iterates = isinstance(value, Iterator) and not isinstance(value, io.IOBase)
    if not _copies(value, memo) and not iterates and not isinstance(value, nn.Module):
        memo[id(value)] = found[path] = value


def _copies(value: PyObject, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _parts(value: PyObject) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from [(f"[{key!r}]", part) for key, part in value.items()]  # a copy may add to it: modules import others
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{n}]", part) for n, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((f".args[{n}]", part) for n, part in enumerate(value.args))
    elif not isinstance(value, (torch.Tensor, nn.Module, type)) and hasattr(value, "__dict__"):
        yield from [(f".{name}", part) for name, part in vars(value).items()]


def _refers(value: PyObject, modules: set[int], depth: int) -> bool:
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


def _filled(cell: PyObject) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True

"""Blocks that have codes in the place of their experts' floats: what those were, and calls that would need them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moeopt.errors import UsageError
from moeopt.rewrite.live_weights import Place
from moeopt.value_types import PyObject

FLOATS = "_moeopt_floats"
"""The attribute of a block that remembers the floats that were taken away: by path, (shape, dtype)."""


def floats_of(module: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The floats that were taken away from a block: by path, (shape, dtype)."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = module.__dict__.get(FLOATS, {})
    return found


def check_dtypes(module: nn.Module, call: PyObject, error: RuntimeError) -> None:
    """``UsageError`` from ``error`` where a cast gave the inputs of quantised experts another dtype than theirs."""
    held = {dtype for _, dtype in floats_of(module).values()}
    given = {t.dtype for t in tree_leaves(call) if isinstance(t, Tensor) and t.is_floating_point()}
    if held and given and not held & given:
        raise UsageError(
            f"{type(module).__name__} was called with {_shown(given)}, and its quantised experts stand for "
            f"{_shown(held)} ({error}): codes and scales keep their own dtypes, so cast the model before it is "
            "optimised, with dtype="
        ) from error


def _shown(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype) for dtype in dtypes))


class _Unread(Place):
    """Of a matrix, which may be gone by now and which nobody reads."""

    def __init__(self) -> None:
        self.dtype = torch.float32


def places_of(paths: Collection[str], place: type[Place] = Place) -> Callable[[nn.Module, str], Place]:
    """What finds the tensors at ``paths`` in a block, as ``place`` does, and looks for no other one."""
    return lambda root, path: place(root, path) if path in paths else _Unread()

"""Where two models part: the first submodule that gets the same and gives something else.

Both run on the same inputs, and each submodule that both have under one name is watched. In the order in which
the original's submodules return, the first one counts whose inputs agree and whose outputs lie further apart than
``EPS_ALLOWANCE`` eps: everything after it has other inputs and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.value_types import PyObject
from moeopt.verification.distance import finiteness, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE
from moeopt.verification.model import run_plain
from moeopt.verification.trees import flatten


def first_difference(
    original: nn.Module, optimized: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, float] | None:
    """(name, relative L2 distance of its worst token), or None where no submodule alone explains a difference.

    The distance is infinite where shapes or dtypes differ.
    """
    common = {name for name, _ in original.named_modules()} & {name for name, _ in optimized.named_modules()}
    old, new = (_calls(model, common, args, kwargs) for model in (original, optimized))
    for name, (given, result) in old.items():
        if name not in new:
            continue
        eps = max((torch.finfo(t.dtype).eps for t in result), default=0.0)
        if _apart(given, new[name][0]) <= EPS_ALLOWANCE * eps < (far := _apart(result, new[name][1])):
            return name, far
    return None


def _calls(
    model: nn.Module, names: set[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Floating inputs and outputs of each named submodule's first call, in the order in which the calls return."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def keep(name: str) -> PyObject:
        def hook(module: nn.Module, args: PyObject, kwargs: PyObject, output: PyObject) -> None:
            seen.setdefault(name, (_floats((args, kwargs)), _floats(output)))

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in names
    ]
    try:
        run_plain(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _floats(tree: PyObject) -> list[Tensor]:
    return [
        t.detach().clone() for t in flatten(tree)[0] if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
    ]


def _apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The worst token's distance over all tensors; infinite where they are not alike."""
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        pattern = finiteness(x, y)
        if pattern.leaked:
            return float("inf")
        far = token_distance(y, x)[pattern.both]
        worst = max(worst, float(far.max()) if len(far) else 0.0)
    return worst

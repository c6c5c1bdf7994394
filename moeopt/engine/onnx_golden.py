"""The golden runs of an ONNX Runtime engine: the call it was made with, and the same call in other sizes.

Another provider rounds otherwise. What it may differ by is the budget that the engine itself was held to end to
end: what one rounding error in each block moves the result by. A run that moves further when its own inputs move
by one rounding error has an expert choice on the edge; it would say nothing of the machine, and is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moeopt.engine.conditions import check_conditions
from moeopt.engine.golden import SLACK, Golden, compare, golden_run
from moeopt.engine.onnx_engine import GraphEngine
from moeopt.errors import UsageError

Call = tuple[tuple[Any, ...], dict[str, Any]]
NUDGES = 2


def budget_of(certificate: Any) -> tuple[float | None, str]:
    """The relative L2 distance per token that golden runs may come back with, and why; None is 8 eps."""
    end = getattr(certificate, "end_to_end", None)
    if end is None or end.passed is not True or not end.budget > 0:
        return None, f"{SLACK:g} eps of the result's dtype: the engine was not verified end to end"
    return float(end.budget), "the end-to-end budget that the engine was verified with: another provider rounds too"


def other_sizes(signature: Mapping[str, Any], call: Call) -> list[Call]:
    """The call with every free size made larger, and made the least, its values repeated or cut off."""
    leaves, spec = pytree.tree_flatten((tuple(call[0]), dict(call[1])))
    entries = signature["inputs"]
    if len(leaves) != len(entries):
        return []
    have: dict[str, int] = {}
    for leaf, entry in zip(leaves, entries, strict=True):
        if "shape" in entry:
            if any(dim is None for dim in entry["shape"]):
                return []  # sizes that hang together by arithmetic
            have |= {dim: size for dim, size in zip(entry["shape"], leaf.shape, strict=True) if isinstance(dim, str)}
    calls = []
    for change in (lambda n: 2 * n + 1, lambda n: 1):
        sizes = {dim: _within(change(n), signature["sizes"].get(dim, [0, None])) for dim, n in have.items()}
        if sizes != have:
            made = [_resized(leaf, entry, sizes) for leaf, entry in zip(leaves, entries, strict=True)]
            with contextlib.suppress(UsageError):  # sizes that the engine itself says it does not hold for
                check_conditions(signature.get("conditions", []), lambda n, made=made: made[n].shape, str)  # type: ignore[misc]
                calls.append(pytree.tree_unflatten(made, spec))
    return calls


def golden_runs(engine: GraphEngine, calls: Sequence[Call], distance: float | None) -> list[Golden]:
    """What ``engine`` makes of each call, those without a margin left out unless none is left."""
    runs, steady = [], []
    for number, (args, kwargs) in enumerate(calls):
        try:
            run = golden_run(args, kwargs, engine.run_graph(*args, **kwargs))
        except Exception:
            if number == 0:
                raise
            continue  # a size that the model cannot take
        runs.append(run)
        if _has_margin(engine, run, distance):
            steady.append(run)
    return steady or runs[:1]


def _has_margin(engine: GraphEngine, run: Golden, distance: float | None) -> bool:
    generator = torch.Generator().manual_seed(0)

    def nudged(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        return (value.double() * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)

    for _ in range(NUDGES):
        outputs = pytree.tree_leaves(engine.run_flat([nudged(v) for v in run.inputs]))
        for got, want in zip(outputs, run.outputs, strict=True):
            inexact = isinstance(want, Tensor) and want.is_floating_point()
            far, reason = compare(got.cpu() if isinstance(got, Tensor) else got, want)
            if reason or far > (distance or (SLACK * torch.finfo(want.dtype).eps if inexact else 0.0)):
                return False
    return True


def _within(size: int, bounds: list[Any]) -> int:
    low, high = bounds
    return max(low, size if high is None else min(size, high))


def _resized(leaf: Any, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    if "shape" not in entry:
        return leaf
    for axis, dim in enumerate(entry["shape"]):
        if isinstance(dim, str) and leaf.shape[axis] and leaf.shape[axis] != sizes[dim]:
            leaf = leaf.index_select(axis, torch.arange(sizes[dim], device=leaf.device) % leaf.shape[axis])
    return leaf

"""How far the original might have been: its own code, at its own dtypes, with every result rounded otherwise.

A token whose sum cancels has no good digits in any order of summation, and on one such token the original may
be right by luck. What it would be without luck is measured, not guessed: the original runs again with its
choices pinned, and each op's result is moved by a random relative error of at most one eps of the dtype it has
(Monte Carlo arithmetic; Parker 1997). An op that is correct to rounding could as well have returned that
result: by backward error analysis it is the exact one of inputs about as near. So the distance of these runs
from the float64 oracle is what any equally careful order of the same arithmetic must be allowed.

A well-conditioned token is moved by an eps or two. Noise enters in the dtype of each result, so a router in
float32 stays one: code that does in bfloat16 what the original does in float32 gets nothing from this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from moeopt.value_types import PyObject
from moeopt.verification.distance import features_last, token_distance
from moeopt.verification.float64_rules import MOVES, Float64Rule
from moeopt.verification.noise import narrows
from moeopt.verification.oracle import Pinned, run_in
from moeopt.verification.selections import Selections
from moeopt.verification.trees import flatten

RERUNS = 4
"""Runs of which the root mean square is taken: one alone may be as lucky as the original was."""

_EXACT = """
    copy_ fill_ zero_ index_put index_put_ _index_put_impl_ scatter scatter_ index_copy index_copy_ masked_fill
    masked_fill_ masked_scatter masked_scatter_ where neg abs relu relu_ maximum minimum max min amax amin sort topk
    detach lift_fresh
"""
EXACT = MOVES | {f"aten::{name}" for name in _EXACT.split()}
"""Ops whose results are some of their inputs, or their negatives: nothing is rounded."""


def rerounded_distances(
    fn: Callable[..., Any],
    args: PyObject,
    kwargs: PyObject,
    selections: Selections,
    oracle: list[Any],
    eps: list[float],
    features: int | None = None,
) -> list[Tensor | None]:
    """Per output leaf, the root mean square over RERUNS of each token's distance from ``oracle``.

    Args:
        fn, args, kwargs: the original and one call of it.
        selections: its choices, pinned in every run.
        oracle: the leaves of its float64 outputs.
        eps: of each leaf, as in ``token_distance``.
        features: of a token, as ``features_last`` takes them.

    Returns:
        float64 (tokens,) per floating leaf; None for the other leaves. Tokens that were not finite hold NaN.

    Raises:
        OracleError: the code chooses otherwise when it is rounded otherwise.
    """
    squares: list[Tensor | None] = [None] * len(oracle)
    for seed in range(RERUNS):
        leaves = flatten(run_in(fn, args, kwargs, _Rerounded(selections, seed)))[0]
        for n, (y, o) in enumerate(zip(leaves, oracle, strict=True)):
            if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
                pair = (features_last(t, features) for t in (y, o))
                d = token_distance(*pair, eps=eps[n]).square() / RERUNS
                before = squares[n]
                squares[n] = d if before is None else before + d
    return [None if total is None else total.sqrt() for total in squares]


class _Rerounded(Pinned):
    """Runs ops as they are, choices pinned, and moves each rounded result by up to one eps."""

    def __init__(self, selections: Selections, seed: int) -> None:
        super().__init__(selections)
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def compute(self, plan: Float64Rule, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        if func.is_view or func._schema.name in EXACT:
            return super().compute(plan, func, args, kwargs)
        if plan.written:
            targets = [t for t in plan.targets(args, kwargs) if t.is_floating_point()]
            before = [t.clone() for t in targets]
            out = super().compute(plan, func, args, kwargs)
            for target, old in zip(targets, before, strict=True):
                if target.shape == old.shape:  # what was not touched was not rounded
                    target.copy_(torch.where(target == old, target, self.moved(target)))
            return out
        out = super().compute(plan, func, args, kwargs)
        if func is torch.ops.aten._to_copy.default and not narrows(args[0], out):
            return out
        return pytree.tree_map_only(Tensor, self.moved, out)

    def moved(self, y: Tensor) -> Tensor:
        """``y``, each element times 1 + u * eps, u uniform in [-1, 1]."""
        if not y.is_floating_point():
            return y
        if y.device not in self._generators:
            self._generators[y.device] = torch.Generator(y.device).manual_seed(self._seed)
        u = torch.rand(y.shape, dtype=torch.float64, device=y.device, generator=self._generators[y.device])
        return (y.double() * (1 + (2 * u - 1) * torch.finfo(y.dtype).eps)).to(y.dtype)

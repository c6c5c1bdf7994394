"""The golden run of a saved model: what another machine may differ by, and the tokens that say nothing of a machine.

Another CPU adds up a product's terms in another order. How far that moves each token shows here: the model runs again
with one rounding of noise behind each product, ``y * (1 + eps * n)`` with n normal. A token that goes further than the
budget has a choice on the edge, mostly of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.bundle.caches import result_leaves
from moeopt.bundle.golden import SLACK, golden_run, moved_rows, with_edges
from moeopt.capture.tree import ArgsKwargs
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.experts import experts
from moeopt.ops.override import default_impl, override_experts_impl
from moeopt.value_types import PyObject
from moeopt.verification.judge import FACTOR
from moeopt.verification.model import CEILING, run_plain

NUDGES = 2
PRODUCTS = frozenset("mm addmm bmm baddbmm mv addmv dot linear convolution _grouped_mm _scaled_mm".split())
"""ATen's names of what sums up products; attention in one call is named ``_scaled_dot_product_...``."""


class _Shaken(TorchDispatchMode):
    """Every product's result is rounded otherwise."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            return self.shake(out)
        return (self.shake(out[0]), *out[1:]) if name.startswith("_scaled_dot_product") else out

    def shake(self, t: Tensor) -> Tensor:
        if not t.is_floating_point() or torch._C._functorch.is_functorch_wrapped_tensor(t):
            return t  # under vmap nothing may be drawn
        wide = t if t.dtype == torch.float64 else t.float()
        noise = torch.randn(t.shape, generator=self.generator).to(t.device, wide.dtype)
        return (wide * (1 + torch.finfo(t.dtype).eps * noise)).to(t.dtype)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
        """The op, whose kernels are no ATen calls."""
        with default_impl():
            return self.shake(experts(x, ids, weights, bank, spec))


def budget_and_edges(
    model: nn.Module, call: ArgsKwargs, result: PyObject, budget: float | None
) -> tuple[float, Mapping[int, Tensor]]:
    """The distance per token that a call which gave ``result`` may come back with; ``Golden.edges``.

    Args:
        budget: what the model was verified with, end to end; None where it was not, and the budget is made of what
            rounding moves most tokens by.
    """
    run = golden_run(*call, result)
    again = list(_again(model, call, len(run.outputs)))
    if budget is None:
        budget = min(max([_allowed(y, [one[j] for one in again]) for j, y in enumerate(run.outputs)] or [0.0]), CEILING)
    steady = with_edges(run, again, budget)
    return budget, {} if steady is None else steady.edges


def _allowed(value: PyObject, again: Sequence[Any]) -> float:
    """What a result of a model that was not verified may be off by."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    moved = [float(far.median()) for one in again if (far := moved_rows(one, value)) is not None]
    return max(SLACK * torch.finfo(value.dtype).eps, FACTOR * max(moved, default=0.0))


def _again(model: nn.Module, call: ArgsKwargs, count: int) -> Iterator[list[Any]]:
    """The results of the same call, with noise."""
    for seed in range(NUDGES):
        shaken = _Shaken(seed)
        try:
            with override_experts_impl(shaken.experts), shaken:
                got = result_leaves(run_plain(model, *call))
        except Exception:  # of the model's own code, where a number that is rounded otherwise is refused
            return
        if len(got) == count:
            yield got

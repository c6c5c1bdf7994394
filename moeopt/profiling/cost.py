"""What imbalance costs: the op timed on a call's own routing and on a balanced one, in turns, on this machine.

The balanced routing has the same tokens, slots and weights; each slot that names an expert names the next one in
turn, so every expert gets the same number of rows, give or take one. Few tokens that crowd on few experts read
fewer weights, so "balanced" can be the slower one: then the ratio is below 1.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.experts import experts
from moeopt.ops.override import default_impl
from moeopt.ops.stopwatch import Stopwatch

REPEATS, MOST, ENOUGH = 8, 64, 0.06
"""Pairs of timings of one call: at least, at most, and after how many seconds there are enough."""
CALLS = 3
"""Calls of a block that are timed, at most."""
COLD = 1 << 40
"""Bytes to write before a call on a GPU: as many as its L2 cache asks for."""
SECONDS = 0.25
"""Once a block's timings took as long, no further call is timed."""


class RoutingCost:
    """Sums over the timed calls: ``observed`` and ``balanced`` in seconds, ``tokens``, experts hit by each routing.

    ``noise`` is by how much equal timings differed at worst: a ratio that is no further from 1 says nothing.
    """

    def __init__(self) -> None:
        self.calls = self.tokens = self.hit_observed = self.hit_balanced = 0
        self.observed = self.balanced = self.noise = self._spent = 0.0

    def wants(self, ids_TK: Tensor) -> bool:
        """Whether this call shall be timed."""
        return ids_TK.numel() > 0 and self.calls < CALLS and self._spent < SECONDS

    def measure(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> None:
        """Time the op on this call's tokens: once to warm up, then in turns; the quickest counts."""
        even_TK = balanced(ids_TK, bank.num_experts)
        watch = Stopwatch(x_TH.device, COLD if x_TH.is_cuda else 0)
        calls = [functools.partial(experts, x_TH, ids, weights_TK, bank, spec) for ids in (ids_TK, even_TK)]
        times: tuple[list[float], list[float]] = ([], [])
        with torch.no_grad(), default_impl():
            for call in calls:
                call()  # a kernel may be compiled here, which is no cost of a routing
            began = time.perf_counter()
            while len(times[0]) < REPEATS or (len(times[0]) < MOST and time.perf_counter() - began < ENOUGH):
                for call, kept in zip(calls, times, strict=True):
                    kept.append(watch.seconds(call))
        self.calls += 1
        self.tokens += ids_TK.shape[0]
        self.observed += min(times[0])
        self.balanced += min(times[1])
        self.noise = max(self.noise, *map(_noise, times))
        self.hit_observed += _hit(ids_TK, bank.num_experts)
        self.hit_balanced += _hit(even_TK, bank.num_experts)
        self._spent += time.perf_counter() - began

    def summary(self) -> dict[str, float] | None:
        """Means per timed call, observed over balanced, and the noise of that; None where nothing could be timed."""
        if not self.calls or not self.balanced or self.noise == float("inf"):
            return None
        return {
            "calls": self.calls,
            "tokens": self.tokens / self.calls,
            "observed_seconds": self.observed / self.calls,
            "balanced_seconds": self.balanced / self.calls,
            "ratio": self.observed / self.balanced,
            "noise": self.noise,
            "experts_hit_observed": self.hit_observed / self.calls,
            "experts_hit_balanced": self.hit_balanced / self.calls,
        }


def balanced(ids_TK: Tensor, experts: int) -> Tensor:
    """The same slots, those that name an expert dealt out in turn; distinct within a token while K <= E."""
    inside = (ids_TK >= 0) & (ids_TK < experts)
    turn = inside.reshape(-1).cumsum(0).view_as(inside) - 1
    return torch.where(inside, (turn % experts).to(ids_TK.dtype), ids_TK)


def _noise(seconds: list[float]) -> float:
    """How far the quickest of every other timing is from the quickest of the rest, as a part of it."""
    odd, even = min(seconds[::2]), min(seconds[1::2])
    return max(odd, even) / min(odd, even) - 1 if min(odd, even) > 0 else float("inf")


def _hit(ids: Tensor, experts: int) -> int:
    return int(ids[(ids >= 0) & (ids < experts)].unique().numel())

"""Is the rewritten form of a block quicker here? Both run in turn on the block's own weights, and medians decide.

Before each call as many bytes are written, on the device of the call, as the rest of the model would read, up to 32 MB
on a CPU and twice the L2 cache on a GPU; see ``moeopt.ops.stopwatch`` for the clocks.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.capture.tree import ArgsKwargs
from moeopt.ops.stopwatch import Stopwatch

TOKENS = (1, 4, 16, 128)
"""Token counts that count alike when the user names none: decode, small batches, a prompt."""
CALLS = 7
SECONDS = 2.0
"""After so long no further call of one token count is made, once there are three."""
GAIN, LOSS = 1.05, 1.03
"""A form is taken where it is 5 % quicker over all counts together and at none more than 3 % slower."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call with ``tokens`` tokens."""

    tokens: int
    before: float
    after: float

    def __str__(self) -> str:
        unit = f"token{'s' if self.tokens != 1 else ''}"
        return f"{1e3 * self.after:.3g} ms, as it is {1e3 * self.before:.3g} ms at {self.tokens} {unit}"


def in_turn(before: Callable[..., Any], after: Callable[..., Any], call: ArgsKwargs, tokens: int, flush: int) -> Timing:
    """Medians of both on the same call, which has ``tokens`` tokens; ``flush`` bytes are written before each."""
    tensors = (a for a in pytree.tree_leaves(call) if isinstance(a, torch.Tensor))
    watch = Stopwatch(next((a.device for a in tensors), torch.device("cpu")), flush)
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    with torch.no_grad():
        for turn in range(CALLS + 2):
            for which in (1, 0) if turn % 2 else (0, 1):  # the original first: it may not take so many tokens
                seconds = watch.seconds(functools.partial((before, after)[which], *call[0], **call[1]))
                if turn > 1:  # the first two warm up: a 16-bit GEMM is compiled for each number of rows
                    times[which].append(seconds)
            if len(times[0]) >= 3 and time.perf_counter() - started > SECONDS:
                break
    return Timing(tokens, statistics.median(times[0]), statistics.median(times[1]))


def pays(timings: list[Timing]) -> bool:
    """Whether the rewritten form is to be taken; see ``GAIN`` and ``LOSS``."""
    ratios = [t.before / t.after for t in timings]
    return statistics.geometric_mean(ratios) >= GAIN and min(ratios) >= 1 / LOSS

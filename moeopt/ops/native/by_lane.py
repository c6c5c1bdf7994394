"""Whether many rows of an expert are multiplied lane by lane: checked to the bit, then measured on the machine.

The kernel has two products for them with the same bits (``src/by_lane.h``), so which one runs is a question of speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.measured import TimedCall, fastest
from moeopt.ops.native.call import NativeRun, call

BY_LANE = 1 << 16
"""``MOEOPT_BY_LANE`` of the kernel's header, which is added to the bit of an instruction set."""
HAVE_LANES = ("avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""The instruction sets with a product of either kind."""
ADVANTAGE = 1.03
"""How many times as fast the product by lane must be."""
DTYPES = torch.float32, torch.bfloat16
TIMED_ROWS = 16, 48
"""Near the fewest that are multiplied so, which turn W for little, and many: each counts the same."""


def by_lane_differs(run: NativeRun, isa: int) -> str:
    """What comes out with other bits lane by lane than as dot products, in words; "" where nothing does."""
    with torch.no_grad():
        for dtype in DTYPES:
            one = _many_rows(run, rows=29, H=300, I=271, dtype=dtype)
            if not torch.equal(one(isa), one(isa | BY_LANE)):
                return f"29 rows of {str(dtype).removeprefix('torch.')} have other bits lane by lane"
    return ""


def by_lane_pays(run: NativeRun, isa: int, name: str) -> bool:
    """Whether products lane by lane are the faster on this machine; ``name`` is that of the instruction set."""

    def ways() -> dict[str, list[TimedCall]]:
        # weights of 44 and 22 megabytes, as memory gives them: out of a cache, dot products may be the faster
        calls = [
            _many_rows(run, rows=rows, H=1024, I=64, dtype=dtype, repeats=56) for dtype in DTYPES for rows in TIMED_ROWS
        ]
        return {
            "dot products": [partial(one, isa) for one in calls],
            "by lane": [partial(one, isa | BY_LANE) for one in calls],
        }

    return fastest(f"many rows of an expert, {name}", ways, "dot products", advantage=ADVANTAGE) == "by lane"


def _many_rows(
    run: NativeRun, rows: int, H: int, I: int, dtype: torch.dtype, repeats: int = 1
) -> Callable[[int], Tensor]:
    """A call of an expert of ``I`` gated neurons, each ``repeats`` times, on ``rows`` tokens, by an instruction set."""
    rng = torch.Generator().manual_seed(0)

    def some(*size: int) -> Tensor:
        return (torch.randn(size, generator=rng) / math.sqrt(size[-1])).to(dtype)

    w_in, w_out = some(1, 2 * I, H).repeat(1, repeats, 1), some(1, H, I).repeat(1, 1, repeats)
    bank, spec = StackedExpertWeights([w_in], w_out), ExpertsSpec()
    x, ids, weights = some(rows, H), torch.zeros(rows, 1, dtype=torch.int64), some(rows, 1)

    def one(isa: int) -> Tensor:
        return call(run, x, ids, weights, bank, spec, isa)

    return one

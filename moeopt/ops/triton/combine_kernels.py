"""The kernels of the experts' outputs, a row for each pair: each token's sum, with a norm of whole rows before it.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs (token, slot), H hidden, I intermediate, D out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeopt.ops.triton.kernel_parts import NORM, slot_of_turn, vector, weighed
from moeopt.ops.triton.pointwise import rounded


@triton.jit
def combine(
    term, x, x_t, x_h, ids, ids_t, ids_k, weights, weights_t, weights_k, y, E, K, D,
    F: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Add each token's terms in the spec's order: ``y`` (T, D). A pair of no expert has no term, and none is read."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for turn in range(0, K):
        slot = slot_of_turn(ids, t, ids_t, ids_k, turn, K, F, KP)
        e = tl.load(ids + t * ids_t + slot * ids_k).to(tl.int64)
        if (e >= 0) & (e < E):
            at = term + (t * K + slot) * D + n
            total = rounded(total + tl.load(at, mask=n < D, other=0.0).to(tl.float32), F.accum)
        elif F.identity:
            if e >= E:
                w = tl.load(weights + t * weights_t + slot * weights_k).to(tl.float32)
                own = tl.load(x + t * x_t + n * x_h, mask=n < D, other=0.0).to(tl.float32)
                total = rounded(total + rounded(rounded(own * w, F.x_weight), F.accum), F.accum)
    tl.store(y + t * D + n, total.to(y.dtype.element_ty), mask=n < D)


@triton.jit
def combine_normed(
    o, x, x_t, x_h, ids, ids_t, ids_k, weights, weights_t, weights_k, table, norm_step, y, E, K, D,
    F: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """``combine`` of rows that are normed first (RMSNorm over the row of a pair, its weight), whole rows at once."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for turn in range(0, K):
        slot = slot_of_turn(ids, t, ids_t, ids_k, turn, K, F, KP)
        e = tl.load(ids + t * ids_t + slot * ids_k).to(tl.int64)
        w = tl.load(weights + t * weights_t + slot * weights_k).to(tl.float32)
        if (e >= 0) & (e < E):
            row = tl.load(o + (t * K + slot) * D + n, mask=n < D, other=0.0).to(tl.float32)
            v = row / tl.sqrt(tl.sum(row * row, 0) / D + F.norm_eps)
            if F.norm_weight:
                v = v * vector(table, NORM, e, E, n, D, norm_step, F.bias_dtype, F.compute)
            total = rounded(total + weighed(rounded(v, F.compute), w, F), F.accum)
        elif F.identity:
            if e >= E:
                own = tl.load(x + t * x_t + n * x_h, mask=n < D, other=0.0).to(tl.float32)
                total = rounded(total + rounded(rounded(own * w, F.x_weight), F.accum), F.accum)
    tl.store(y + t * D + n, total.to(y.dtype.element_ty), mask=n < D)

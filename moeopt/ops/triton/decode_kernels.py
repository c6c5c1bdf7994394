"""The kernels of few pairs: nothing is sorted, each pair reads its expert's weights and multiplies one row.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs (token, slot), H hidden, I intermediate, D out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeopt.ops.triton.kernel_parts import (
    BIAS_GATE,
    BIAS_OUT,
    BIAS_UP,
    GATE,
    OUT,
    UP,
    cast_rows,
    matrix,
    slot_of_turn,
    vector,
    weighed,
)
from moeopt.ops.triton.pointwise import middle, rounded


@triton.jit
def gemv_in(
    x, x_t, x_h, ids, ids_t, ids_k, weights, weights_t, weights_k, table, out_step, in_step, bias_step, a, E, K, H, I,
    F: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One pair's first product for BN columns, bias, activation: row ``pair`` of ``a`` (R, I)."""
    pair = tl.program_id(0).to(tl.int64)
    t, slot = pair // K, pair % K
    e = tl.load(ids + t * ids_t + slot * ids_k).to(tl.int64)
    if (e >= 0) & (e < E):
        n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        w = tl.load(weights + t * weights_t + slot * weights_k).to(tl.float32)
        at = n[:, None].to(tl.int64) * out_step + k[None, :] * in_step
        gate = matrix(table, GATE, e, E, F.w_dtype, F.aligned) + at
        up = matrix(table, UP, e, E, F.w_dtype, F.aligned) + at
        g = tl.zeros((BN, BK), tl.float32)
        u = tl.zeros((BN, BK), tl.float32)
        for h in range(0, H, BK):
            r = cast_rows(tl.load(x + t * x_t + (h + k) * x_h, mask=h + k < H, other=0.0), w, F).to(tl.float32)
            ok = (n[:, None] < I) & (h + k[None, :] < H)
            g += tl.load(gate, mask=ok, other=0.0).to(F.compute).to(tl.float32) * r[None, :]
            if F.gated:
                u += tl.load(up, mask=ok, other=0.0).to(F.compute).to(tl.float32) * r[None, :]
            gate += BK * in_step
            up += BK * in_step
        g_n, u_n = tl.sum(g, 1), tl.sum(u, 1)
        if F.bias_in:
            g_n += vector(table, BIAS_GATE, e, E, n, I, bias_step, F.bias_dtype, F.compute)
            u_n += vector(table, BIAS_UP, e, E, n, I, bias_step, F.bias_dtype, F.compute)
        tl.store(a + pair * I + n, middle(g_n, u_n, F).to(F.compute), mask=n < I)


@triton.jit
def row_product(
    row, table, e, E, n, k, out_step, in_step, bias_step, I, D,
    F: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W_out of expert ``e`` on one row, columns ``n``, with its bias, as the compute dtype holds it."""
    w_out = matrix(table, OUT, e, E, F.w_dtype, F.aligned) + n[:, None].to(tl.int64) * out_step + k[None, :] * in_step
    o = tl.zeros((BN, BK), tl.float32)
    for i in range(0, I, BK):
        r = tl.load(row + i + k, mask=i + k < I, other=0.0).to(tl.float32)
        ok = (n[:, None] < D) & (i + k[None, :] < I)
        tile = tl.load(w_out, mask=ok, other=0.0)
        o += tile.to(F.compute).to(tl.float32) * r[None, :]
        w_out += BK * in_step
    o_n = tl.sum(o, 1)
    if F.bias_out:
        o_n += vector(table, BIAS_OUT, e, E, n, D, bias_step, F.bias_dtype, F.compute)
    return rounded(o_n, F.compute)


@triton.jit
def gemv_out(
    a, x, x_t, x_h, ids, ids_t, ids_k, weights, weights_t, weights_k, table, out_step, in_step, bias_step, y,
    E, K, I, D, F: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One token's second matmuls for BN columns, with bias and routing weight, summed in order: ``y`` (T, D).

    The K experts' weights are asked for at once: one expert after the other would wait for memory K times.
    """
    t = tl.program_id(0).to(tl.int64)
    n, k, slots = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, KP)
    e = tl.load(ids + t * ids_t + slots * ids_k, mask=slots < K, other=0).to(tl.int64)
    held = (e >= 0) & (e < E) & (slots < K)
    w_out = tl.load(table + OUT * E + e, mask=held, other=0).to(tl.pointer_type(F.w_dtype))
    if F.aligned:
        w_out = tl.multiple_of(w_out, 16)
    at = w_out[:, None, None] + n[None, :, None].to(tl.int64) * out_step + k[None, None, :] * in_step
    rows = a + (t * K + slots[:, None]) * I + k[None, :]
    o = tl.zeros((KP, BN, BK), tl.float32)
    for i in range(0, I, BK):
        r = tl.load(rows + i, mask=held[:, None] & (i + k[None, :] < I), other=0.0).to(tl.float32)
        ok = held[:, None, None] & (n[None, :, None] < D) & (i + k[None, None, :] < I)
        o += tl.load(at, mask=ok, other=0.0).to(F.compute).to(tl.float32) * r[:, None, :]
        at += BK * in_step
    o_kn = tl.sum(o, 2)
    if F.bias_out:
        bias = tl.load(table + BIAS_OUT * E + e, mask=held, other=0)
        at_bias = bias.to(tl.pointer_type(F.bias_dtype))[:, None] + n[None, :] * bias_step
        b = tl.load(at_bias, mask=(bias[:, None] != 0) & (n[None, :] < D), other=0.0)
        o_kn += rounded(b.to(tl.float32), F.compute)
    w = tl.load(weights + t * weights_t + slots * weights_k, mask=slots < K, other=0.0).to(tl.float32)[:, None]
    term = tl.where(held[:, None], weighed(rounded(o_kn, F.compute), w, F), 0.0)
    if F.identity:
        own = tl.load(x + t * x_t + n * x_h, mask=n < D, other=0.0).to(tl.float32)
        own = rounded(rounded(own[None, :] * w, F.x_weight), F.accum)
        term = tl.where(((e >= E) & (slots < K))[:, None], own, term)
    total = tl.zeros((BN,), tl.float32)
    for turn in range(0, K):
        slot = slot_of_turn(ids, t, ids_t, ids_k, turn, K, F, KP)
        one = tl.sum(tl.where(slots[:, None] == slot, term, 0.0), 0)
        total = rounded(total + one, F.accum)
    tl.store(y + t * D + n, total.to(y.dtype.element_ty), mask=n < D)


@triton.jit
def gemv_pair(
    a, ids, ids_t, ids_k, table, out_step, in_step, bias_step, o, E, K, I, D,
    F: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One pair's second matmul for BN columns with its bias: row ``pair`` of ``o`` (R, D), for ``combine_normed``."""
    pair = tl.program_id(0).to(tl.int64)
    e = tl.load(ids + (pair // K) * ids_t + (pair % K) * ids_k).to(tl.int64)
    if (e >= 0) & (e < E):
        n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        o_n = row_product(a + pair * I, table, e, E, n, k, out_step, in_step, bias_step, I, D, F, BN, BK)
        tl.store(o + pair * D + n, o_n.to(o.dtype.element_ty), mask=n < D)

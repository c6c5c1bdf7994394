"""The Triton kernels of the experts op.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs (token, slot), H hidden, I intermediate, D out.

Few pairs:   ``gemv_in`` then ``gemv_out``: nothing is sorted, each pair reads its expert's weights.
Many pairs:  ``sort_pairs``, ``tile_in``, ``tile_out``, ``combine``: each expert's weights are read once a tile of rows.
A norm after W_out needs whole rows: ``norm_terms`` runs between, and ``combine`` is always used.

Weights are found through ``table``, (9, E) addresses: w_in, second w_in, w_out, their biases, the norm; 0 is absent.
No kernel adds floats in an order that depends on time, and none is told by the host how many rows an expert has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeopt.ops.triton.pointwise import middle, rounded

GATE, UP, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Rows of ``table``: matrices. A joined w_in is in rows GATE and UP, with the address of its own first row of each."""
BIAS_GATE, BIAS_UP, BIAS_OUT, NORM = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def matrix(table, row, e, E, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the matrix of expert ``e``; vector loads need to be told that addresses are multiples of 16."""
    weight = tl.load(table + row * E + e).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    return weight


@triton.jit
def vector(table, row, e, E, n, size, step, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Entries ``n`` < ``size`` of a bias or norm of expert ``e``, rounded to the compute dtype; zeros if absent."""
    address = tl.load(table + row * E + e)
    at = address.to(tl.pointer_type(DTYPE)) + n * step
    held = tl.where(address == 0, 0, size)
    return rounded(tl.load(at, mask=n < held, other=0.0).to(tl.float32), COMPUTE)


@triton.jit
def product(a, b, acc, F: tl.constexpr):
    """``acc + a @ b`` of tiles in the compute dtype, summed in float32."""
    if F.widen:  # the interpreter reads bfloat16 operands of a product as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=F.precision)


@triton.jit
def cast_rows(x, w, F: tl.constexpr):
    """Rows of x as the first matmul takes them, with the routing weight on them where the spec says so."""
    if F.weight_on_input:
        x = rounded(x.to(tl.float32) * w, F.x_weight)
    return x.to(F.compute)


@triton.jit
def weighed(o, w, F: tl.constexpr):
    """The term of a pair: its expert's output times the routing weight, as the accumulator takes it."""
    if not F.weight_on_input:
        o = rounded(o * w, F.out_weight)
    return rounded(o, F.accum)


@triton.jit
def slot_of_turn(ids, t, ids_t, ids_k, turn, K, F: tl.constexpr, KP: tl.constexpr):
    """Which slot of token ``t`` is added in ``turn``: slots in order, or by expert and then by slot."""
    if F.by_expert:
        k = tl.arange(0, KP)
        id_k = tl.load(ids + t * ids_t + k * ids_k, mask=k < K, other=0).to(tl.int64)
        before = (id_k[None, :] < id_k[:, None]) | ((id_k[None, :] == id_k[:, None]) & (k[None, :] < k[:, None]))
        rank = tl.sum((before & (k[None, :] < K)).to(tl.int32), 1)
        return tl.sum(tl.where((rank == turn) & (k < K), k, 0), 0)
    else:
        return turn


@triton.jit
def sort_pairs(ids, ids_t, ids_k, order, ends, R, K, E, BLOCK: tl.constexpr):
    """A stable counting sort, one program an expert: the pairs of expert e in ``order``, its end in ``ends[e]``.

    Each program reads all R ids. Pairs of no expert are in no place of ``order``.
    """
    e = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    smaller = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, R, BLOCK):
        r = start + lane
        i = tl.load(ids + (r // K).to(tl.int64) * ids_t + (r % K) * ids_k, mask=r < R, other=-1).to(tl.int64)
        smaller += ((i >= 0) & (i < e)).to(tl.int32)
        own += (i == e).to(tl.int32)
    place = tl.sum(smaller, 0)
    tl.store(ends + e, place + tl.sum(own, 0))
    for start in range(0, R, BLOCK):
        r = start + lane
        i = tl.load(ids + (r // K).to(tl.int64) * ids_t + (r % K) * ids_k, mask=r < R, other=-1).to(tl.int64)
        here = (i == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, 0) - 1, r, mask=here != 0)
        place += tl.sum(here, 0)


@triton.jit
def rows_of_tile(tile, ends, E, BM: tl.constexpr, EP: tl.constexpr):
    """The expert of tile number ``tile``, the tile's first place in ``order`` and the expert's end; E past the last."""
    e = tl.arange(0, EP)
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
    tile_end = tl.cumsum(tiles, 0)
    expert = tl.sum(((tile_end <= tile) & (e < E)).to(tl.int32), 0)
    here = e == expert
    first = tl.sum(tl.where(here, begin + (tile - (tile_end - tiles)) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def tile_in(
    x, x_t, x_h, weights, weights_t, weights_k, order, ends, table, out_step, in_step, bias_step, a, E, K, H, I,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Gather BM rows of one expert, the first matmul's gate and up for BN columns, bias, activation: ``a`` (R, I)."""
    e, first, end = rows_of_tile(tl.program_id(0), ends, E, BM, EP)
    if e < E:
        m, n, k = first + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        row_ok, col_ok = m < end, n < I
        pair = tl.load(order + m, mask=row_ok, other=0).to(tl.int64)
        t = pair // K
        w = tl.load(weights + t * weights_t + (pair % K) * weights_k, mask=row_ok, other=0.0).to(tl.float32)
        at = n[None, :].to(tl.int64) * out_step + k[:, None] * in_step
        gate = matrix(table, GATE, e, E, F.w_dtype, F.aligned) + at
        up = matrix(table, UP, e, E, F.w_dtype, F.aligned) + at
        g = tl.zeros((BM, BN), tl.float32)
        u = tl.zeros((BM, BN), tl.float32)
        for h in range(0, H, BK):
            k_ok = h + k < H
            x_at = x + t[:, None] * x_t + (h + k)[None, :] * x_h
            r = cast_rows(tl.load(x_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0), w[:, None], F)
            ok = k_ok[:, None] & col_ok[None, :]
            g = product(r, tl.load(gate, mask=ok, other=0.0).to(F.compute), g, F)
            if F.gated:
                u = product(r, tl.load(up, mask=ok, other=0.0).to(F.compute), u, F)
            gate += BK * in_step
            up += BK * in_step
        if F.bias_in:
            g += vector(table, BIAS_GATE, e, E, n, I, bias_step, F.bias_dtype, F.compute)[None, :]
            u += vector(table, BIAS_UP, e, E, n, I, bias_step, F.bias_dtype, F.compute)[None, :]
        y = middle(g, u, F)
        tl.store(a + m.to(tl.int64)[:, None] * I + n[None, :], y.to(F.compute), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def tile_out(
    a, order, ends, table, out_step, in_step, bias_step, weights, weights_t, weights_k, term, E, K, I, D,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """The second product of BM rows for BN columns, bias, routing weight: row ``pair`` of ``term`` (R, D)."""
    e, first, end = rows_of_tile(tl.program_id(0), ends, E, BM, EP)
    if e < E:
        m, n, k = first + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        row_ok, col_ok = m < end, n < D
        pair = tl.load(order + m, mask=row_ok, other=0).to(tl.int64)
        at = n[None, :].to(tl.int64) * out_step + k[:, None] * in_step
        w_out = matrix(table, OUT, e, E, F.w_dtype, F.aligned) + at
        o = tl.zeros((BM, BN), tl.float32)
        for i in range(0, I, BK):
            k_ok = i + k < I
            rows = tl.load(
                a + m.to(tl.int64)[:, None] * I + (i + k)[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0
            )
            ok = k_ok[:, None] & col_ok[None, :]
            o = product(rows, tl.load(w_out, mask=ok, other=0.0).to(F.compute), o, F)
            w_out += BK * in_step
        if F.bias_out:
            o += vector(table, BIAS_OUT, e, E, n, D, bias_step, F.bias_dtype, F.compute)[None, :]
        o = rounded(o, F.compute)
        if F.norm_eps is None:
            w = tl.load(weights + (pair // K) * weights_t + (pair % K) * weights_k, mask=row_ok, other=0.0)
            o = weighed(o, w.to(tl.float32)[:, None], F)
        at_term = term + pair[:, None] * D + n[None, :]
        tl.store(at_term, o.to(term.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


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
    """One token's second matmuls for BN columns, with bias and routing weight, summed in order: ``y`` (T, D)."""
    t = tl.program_id(0).to(tl.int64)
    n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BN,), tl.float32)
    for turn in range(0, K):
        slot = slot_of_turn(ids, t, ids_t, ids_k, turn, K, F, KP)
        e = tl.load(ids + t * ids_t + slot * ids_k).to(tl.int64)
        w = tl.load(weights + t * weights_t + slot * weights_k).to(tl.float32)
        if (e >= 0) & (e < E):
            row = a + (t * K + slot) * I
            o_n = row_product(row, table, e, E, n, k, out_step, in_step, bias_step, I, D, F, BN, BK)
            total = rounded(total + weighed(o_n, w, F), F.accum)
        elif F.identity:
            if e >= E:
                own = tl.load(x + t * x_t + n * x_h, mask=n < D, other=0.0).to(tl.float32)
                total = rounded(total + rounded(rounded(own * w, F.x_weight), F.accum), F.accum)
    tl.store(y + t * D + n, total.to(y.dtype.element_ty), mask=n < D)


@triton.jit
def gemv_pair(
    a, ids, ids_t, ids_k, table, out_step, in_step, bias_step, o, E, K, I, D,
    F: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One pair's second matmul for BN columns with its bias: row ``pair`` of ``o`` (R, D), for ``norm_terms``."""
    pair = tl.program_id(0).to(tl.int64)
    e = tl.load(ids + (pair // K) * ids_t + (pair % K) * ids_k).to(tl.int64)
    if (e >= 0) & (e < E):
        n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        o_n = row_product(a + pair * I, table, e, E, n, k, out_step, in_step, bias_step, I, D, F, BN, BK)
        tl.store(o + pair * D + n, o_n.to(o.dtype.element_ty), mask=n < D)


@triton.jit
def norm_terms(
    o, ids, ids_t, ids_k, weights, weights_t, weights_k, table, norm_step, term, E, K, D,
    F: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """RMSNorm over the row of a pair, its weight, the routing weight: row ``pair`` of ``o`` into that of ``term``."""
    pair = tl.program_id(0).to(tl.int64)
    t, slot = pair // K, pair % K
    e = tl.load(ids + t * ids_t + slot * ids_k).to(tl.int64)
    if (e >= 0) & (e < E):
        n = tl.arange(0, BN)
        row = tl.load(o + pair * D + n, mask=n < D, other=0.0).to(tl.float32)
        v = row / tl.sqrt(tl.sum(row * row, 0) / D + F.norm_eps)
        if F.norm_weight:
            v = v * vector(table, NORM, e, E, n, D, norm_step, F.bias_dtype, F.compute)
        w = tl.load(weights + t * weights_t + slot * weights_k).to(tl.float32)
        v = weighed(rounded(v, F.compute), w, F)
        tl.store(term + pair * D + n, v.to(term.dtype.element_ty), mask=n < D)


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

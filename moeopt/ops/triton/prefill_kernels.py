"""The kernels of many pairs: pairs sorted by expert, so that each expert's weights are read once a tile of rows.

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
    vector,
    weighed,
)
from moeopt.ops.triton.pointwise import middle, rounded


@triton.jit
def product(a, b, acc, F: tl.constexpr):
    """``acc + a @ b`` of tiles in the compute dtype, summed in float32."""
    if F.widen:  # the interpreter reads bfloat16 operands of a product as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=F.precision)


@triton.jit
def id_of_pair(ids, ids_t, ids_k, r, R, K):
    """The ids of pairs ``r``, -1 behind the last one: what ``other`` is in an unsigned dtype names an expert."""
    i = tl.load(ids + (r // K).to(tl.int64) * ids_t + (r % K) * ids_k, mask=r < R, other=0).to(tl.int64)
    return tl.where(r < R, i, -1)


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
        i = id_of_pair(ids, ids_t, ids_k, r, R, K)
        smaller += ((i >= 0) & (i < e)).to(tl.int32)
        own += (i == e).to(tl.int32)
    place = tl.sum(smaller, 0)
    tl.store(ends + e, place + tl.sum(own, 0))
    for start in range(0, R, BLOCK):
        r = start + lane
        i = id_of_pair(ids, ids_t, ids_k, r, R, K)
        here = (i == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, 0) - 1, r, mask=here != 0)
        place += tl.sum(here, 0)


@triton.jit
def place_of_program(program, tiles, columns, TOGETHER: tl.constexpr):
    """The tile of rows and the block of columns of a program: ``TOGETHER`` tiles take all columns before the next do.

    Programs run about in order, and what runs at once shares the L2 cache. All tiles before the next columns would
    read the rows again from memory for each block of columns; all columns before the next tile, the weights.
    """
    group = program // (TOGETHER * columns)
    within = program % (TOGETHER * columns)
    size = min(tiles - group * TOGETHER, TOGETHER)
    return group * TOGETHER + within % size, within // size


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
    x, x_t, x_h, weights, weights_t, weights_k, order, ends, table, out_step, in_step, bias_step, a, E, K, H, I, tiles,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EP: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Gather BM rows of one expert, the first matmul's gate and up for BN columns, bias, activation: ``a`` (R, I)."""
    tile, block = place_of_program(tl.program_id(0), tiles, (I + BN - 1) // BN, TOGETHER)
    e, first, end = rows_of_tile(tile, ends, E, BM, EP)
    if e < E:
        m, n, k = first + tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BK)
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
    a, order, ends, table, out_step, in_step, bias_step, weights, weights_t, weights_k, term, E, K, I, D, tiles,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EP: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The second product of BM rows for BN columns, bias, routing weight: row ``pair`` of ``term`` (R, D)."""
    tile, block = place_of_program(tl.program_id(0), tiles, (D + BN - 1) // BN, TOGETHER)
    e, first, end = rows_of_tile(tile, ends, E, BM, EP)
    if e < E:
        m, n, k = first + tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BK)
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

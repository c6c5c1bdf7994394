"""What the kernels of decode and of prefill have in common: an expert's weights, and the spec's roundings.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs (token, slot), H hidden, I intermediate, D out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeopt.ops.triton.pointwise import rounded

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

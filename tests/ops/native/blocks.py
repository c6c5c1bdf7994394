"""Random blocks of any size, dtype and strides for the native kernel; weights lie between NaNs that none may read."""

import math
from dataclasses import dataclass

import torch

from moeopt.ops import ListExpertWeights, StackedExpertWeights


@dataclass
class Sizes:
    T: int = 7
    K: int = 2
    E: int = 4
    H: int = 33
    I: int = 19
    D: int = 21


def fenced(values, seed):
    """``values`` as a view into storage that is NaN elsewhere: rows apart, every second column, or as they are."""
    if seed % 3 == 0:
        return values
    shape, step = values.shape, 1 + seed % 2
    around = values.new_full((*shape[:-1], shape[-1] * step + 5), math.nan)
    inside = around[..., 3 : 3 + shape[-1] * step : step]
    inside.copy_(values)
    return inside


def random_block(spec, sizes, dtype=torch.float32, weight_dtype=None, routing_dtype=None, stacked=True, biases=True,
                 seed=0, strange_ids=False, whole_numbers=False):  # fmt: skip
    """(x, ids, weights, bank, spec); ``whole_numbers``: every product and sum is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    T, K, E, H, I = sizes.T, sizes.K, sizes.E, sizes.H, sizes.I
    D = H if spec.out_of_range == "identity" else sizes.D
    weight_dtype = weight_dtype or dtype

    def randn(*shape, to=dtype, scale=1.0):
        if whole_numbers:
            return torch.randint(-2, 3, shape, generator=g).to(to)
        return (torch.randn(*shape, generator=g) * scale).to(to)

    def matrix(out, into, layout):
        w = randn(E, out, into, to=weight_dtype, scale=max(into, 1) ** -0.5)
        if layout == "io":
            w = w.transpose(1, 2).contiguous()
        return fenced(w, seed + out) if seed % 5 else fenced(w.transpose(1, 2).contiguous(), seed).transpose(1, 2)

    rows = {"plain": [I], "separate": [I, I]}.get(spec.rows, [2 * I])
    w_in, w_out = [matrix(n, H, spec.w_in_layout) for n in rows], matrix(D, I, spec.w_out_layout)
    b_in = [fenced(randn(E, n, to=weight_dtype), seed + n) for n in rows] if biases else None
    b_out = fenced(randn(E, D, to=weight_dtype), seed) if biases else None
    norm = None
    if spec.out_norm_eps is not None and seed % 2:
        norm = fenced(1 + randn(E, D, to=weight_dtype) / 4, seed)
    if stacked:
        bank = StackedExpertWeights(w_in, w_out, b_in, b_out, norm)
    else:
        lists = [None if t is None else list(t) for t in (b_out, norm)]
        bank = ListExpertWeights([list(w) for w in w_in], list(w_out), b_in and [list(b) for b in b_in], *lists)
    low, high = (-2, E + 3) if strange_ids else (0, E)
    ids = torch.randint(low, high, (T, K), generator=g)
    if whole_numbers:  # index_add sums what one expert adds twice in float32, whatever the accumulator's dtype
        ids = torch.stack([low + torch.randperm(high - low, generator=g)[:K] for _ in range(T)])
    weights = randn(T, K, to=routing_dtype or dtype) if whole_numbers else torch.rand(T, K, generator=g)
    return fenced(randn(T, H), seed + 1), ids, weights.to(routing_dtype or dtype), bank, spec

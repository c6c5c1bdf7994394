"""The blocks that are timed: shapes of published models, random weights, separate and stacked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.ops import ListExpertWeights, StackedExpertWeights

SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
"""E experts, K chosen per token, H hidden, I intermediate."""
TINY = {"tiny": (8, 2, 64, 48)}


class Block(NamedTuple):
    """x (T, H), ids and weights (T, K), and one set of weights seen both ways."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    stacked: StackedExpertWeights
    separate: ListExpertWeights


def block(E: int, K: int, H: int, I: int, T: int, dtype: torch.dtype, device: str) -> Block:
    g = torch.Generator(device=device).manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) / shape[-1] ** 0.5).to(dtype)

    w_in, w_out = weight(E, 2 * I, H), weight(E, H, I)
    x = torch.randn(T, H, generator=g, device=device).to(dtype)
    weights, ids = torch.softmax(torch.randn(T, E, generator=g, device=device), -1).topk(K)
    separate = ListExpertWeights([list(w_in[:, :I].unbind()), list(w_in[:, I:].unbind())], list(w_out.unbind()))
    return Block(x, ids, weights.to(dtype), StackedExpertWeights([w_in], w_out), separate)


def own_loop(b: Block) -> Tensor:
    """The loop that most home-made blocks run: every expert asks which tokens are its own."""
    y = torch.zeros_like(b.x)
    for e in range(b.separate.num_experts):
        token, slot = torch.where(b.ids == e)
        if token.numel():
            gate, up = (F.linear(b.x[token], w) for w in b.separate.w_in(e))
            out = F.linear(F.silu(gate) * up, b.separate.w_out(e))
            y.index_add_(0, token, out * b.weights[token, slot, None])
    return y


def floor(b: Block, bytes_per_s: float, flops_per_s: float) -> dict[str, float]:
    """Microseconds below which no kernel can be: reading the weights that are hit, and multiplying."""
    E, D, I = b.stacked.w_out_s.shape
    hit, per_expert = b.ids.unique().numel(), 3 * D * I
    return {
        "experts hit": hit,
        "floor of bytes": round(1e6 * hit * per_expert * b.x.itemsize / bytes_per_s, 2),
        "floor of FLOPs": round(1e6 * 2 * b.ids.numel() * per_expert / flops_per_s, 2),
    }

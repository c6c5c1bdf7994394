"""Blocks that are called with expert ids, each of which treats ids that name none of its experts in its own way."""

import torch
import torch.nn.functional as F
from torch import nn

E, H, I, K = 4, 8, 6, 2
OUTSIDE = (-1, -E, -E - 1, E, E + 3)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(E, I, H) * 0.5)
        self.w_out = nn.Parameter(torch.randn(E, H, I) * 0.5)

    def expert(self, x, e):
        return F.silu(x @ self.w_in[e].t()) @ self.w_out[e].t()

    def loop(self, x, ids, weights, experts):
        y = torch.zeros_like(x)
        for e in experts:
            t, k = torch.where(ids == e)
            y.index_add_(0, t, self.expert(x[t], e) * weights[t, k, None])
        return y


class LoopOverUnique(Stacked):
    """-1 is the last expert; an id beyond them raises."""

    def forward(self, x, ids, weights):
        return self.loop(x, ids, weights, ids.unique().tolist())


class LoopOverAll(Stacked):
    """An id that names no expert is dropped."""

    def forward(self, x, ids, weights):
        return self.loop(x, ids, weights, range(E))


class OneHot(Stacked):
    """An id that names no expert raises."""

    def forward(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e, mask in enumerate(F.one_hot(ids, E).permute(2, 1, 0)):
            k, t = torch.where(mask)
            y.index_add_(0, t, self.expert(x[t], e) * weights[t, k, None])
        return y


class OneMore(Stacked):
    """The id E is dropped; another that names no expert raises."""

    def forward(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e, mask in enumerate(F.one_hot(ids, E + 1).permute(2, 1, 0)[:E]):
            k, t = torch.where(mask)
            y.index_add_(0, t, self.expert(x[t], e) * weights[t, k, None])
        return y


class Gathered(Stacked):
    """-1 is the last expert; an id beyond them raises."""

    def forward(self, x, ids, weights):
        h = F.silu(torch.einsum("th,tkih->tki", x, self.w_in[ids]))
        return (torch.einsum("tki,tkhi->tkh", h, self.w_out[ids]) * weights[..., None]).sum(1)


class Selected(Stacked):
    """An id that names no expert raises, as in an embedding."""

    def forward(self, x, ids, weights):
        w_in, w_out = (w.index_select(0, ids.flatten()).unflatten(0, ids.shape) for w in (self.w_in, self.w_out))
        h = F.silu(torch.einsum("th,tkih->tki", x, w_in))
        return (torch.einsum("tki,tkhi->tkh", h, w_out) * weights[..., None]).sum(1)


class ListOfExperts(nn.Module):
    """-1 is the last module of the list; an id beyond them raises."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)) for _ in range(E))

    def forward(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, k = torch.where(ids == e)
            y.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return y


class Hashed(Stacked):
    """The ids of a token are looked up in a buffer, which may be written."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.stack([torch.arange(32) % E, (torch.arange(32) + 1) % E], -1))

    def forward(self, x, tokens, weights):
        ids = self.table[tokens]
        return self.loop(x, ids, weights, ids.unique().tolist())


BLOCKS = (LoopOverUnique, LoopOverAll, OneHot, OneMore, Gathered, Selected, ListOfExperts)


def made(block):
    torch.manual_seed(0)
    return block().eval()


def call(outside=None, tokens=10):
    """x, ids and weights; one of the ids is ``outside``."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, H, generator=generator)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])
    weights = torch.rand(tokens, K, generator=generator) + 0.3
    if outside is not None:
        ids[1, 0] = outside
    return x, ids, weights


def outcome(run, *args):
    """The result, or None where it raises."""
    try:
        return run(*args)
    except Exception:
        return None

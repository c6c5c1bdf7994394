"""Mixtures of one matrix each, which every row passes, weighed by a gate; and lists of heads, which are none."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, made_by, seq

D, N = 16, 4
ALL = "^its experts are one matrix each, and every row passes all of them, weighed by a gate.*topk of the gate's scores"


class SharedDown(nn.Module):
    """Adapters with one matrix down that runs once, and a matrix up each (HydraLoRA)."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.gate = nn.Linear(D, 24), nn.Linear(D, 4, bias=False), nn.Linear(D, N, bias=False)
        self.up = nn.ModuleList(nn.Linear(4, 24, bias=False) for _ in range(N))

    def forward(self, x):
        y, weights = self.base(x), F.softmax(self.gate(x), dim=-1, dtype=torch.float32).to(x.dtype)
        narrow = self.down(x)
        for number, up in enumerate(self.up):
            y = y + torch.unsqueeze(weights[:, :, number], -1) * up(narrow) * 2.0
        return y


@case(seq(D), experts=N, expect="declined", reason=ALL)
def gated_matrices_behind_a_shared_one():
    return SharedDown()


class OneEinsum(nn.Module):
    """The same over a stack, in one einsum."""

    def __init__(self, rank=4):
        super().__init__()
        self.base, self.gate = nn.Linear(D, D), nn.Linear(D, N, bias=False)
        self.down, self.up = nn.Parameter(torch.randn(D, rank) * 0.2), nn.Parameter(torch.randn(N, rank, D) * 0.2)

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return self.base(x) + torch.einsum("bsd,dr,erk,bse->bsk", x, self.down, self.up, weights)


@case(seq(D), experts=N, expect="declined", reason=ALL)
def gated_matrices_in_one_einsum():
    return OneEinsum()


class StackedLayer(nn.Module):
    """A stack of matrices and biases; each row is multiplied by all."""

    def __init__(self, inner, outer):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(N, inner, outer) * 0.3)
        self.bias = nn.Parameter(torch.randn(N, 1, outer) * 0.1)

    def forward(self, x, share):
        each = torch.stack([x.matmul(self.weights[number]) + self.bias[number] for number in range(N)])
        return torch.sum(share.t().unsqueeze(-1) * each, dim=0)


class StackedLayers(nn.Module):
    """A policy of three blended layers, by one gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(D, D), nn.ELU(), nn.Linear(D, N), nn.Softmax(-1))
        self.first, self.second, self.third = StackedLayer(D, 24), StackedLayer(24, 24), StackedLayer(24, 8)

    def forward(self, x):
        share = self.gate(x)
        return self.third(F.elu(self.second(F.elu(self.first(x, share)), share)), share)


@case(flat(D), experts=N, expect="declined", moe=3, reason=ALL)
def gated_matrices_of_a_policy():
    return StackedLayers()


class OneStack(nn.Module):
    """All products in one einsum."""

    def __init__(self):
        super().__init__()
        self.gate, self.weight = nn.Linear(D, N), nn.Parameter(torch.randn(N, D, 24) * 0.3)

    def forward(self, x):
        return torch.einsum("be,beo->bo", self.gate(x).softmax(-1), torch.einsum("bi,eio->beo", x, self.weight).relu())


@case(flat(D), experts=N, expect="declined", reason=ALL)
def gated_matrices_of_a_stack():
    return OneStack()


class OneLayerExperts(nn.Module):
    """A level of a recommender: experts of each task and shared ones, one layer each, and a gate for each task."""

    def __init__(self):
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(self.expert() for _ in range(2)) for _ in range(2))
        self.shared = nn.ModuleList(self.expert() for _ in range(2))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(D, 4), nn.Softmax(dim=1)) for _ in range(2))

    @staticmethod
    def expert():
        return nn.Sequential(nn.Linear(D, 20), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, x):
        shared = [expert(x) for expert in self.shared]
        sets = [torch.stack([*(expert(x) for expert in own), *shared], 1) for own in self.own]
        return [torch.bmm(gate(x).unsqueeze(1), y).squeeze(1) for gate, y in zip(self.gates, sets, strict=True)]


@case(flat(D), experts=6, expect="declined", reason=ALL)
def gated_matrices_of_tasks():
    return OneLayerExperts()


class ListedHeads(nn.Module):
    """An attention whose heads lie in lists; the example is as long as there are heads."""

    def __init__(self, together):
        super().__init__()
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(D, 8) for _ in range(N)) for _ in range(3))
        self.together, self.out = together, nn.Linear(N * 8, D)

    def forward(self, x):
        if self.together:
            q, k, v = (torch.stack([head(x) for head in heads], 1) for heads in (self.q, self.k, self.v))
            heads = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).unbind(1)
        else:
            heads = [(q(x) @ k(x).mT).softmax(-1) @ v(x) for q, k, v in zip(self.q, self.k, self.v, strict=True)]
        return self.out(torch.cat(heads, -1))


as_long = made_by(lambda s, g: ((torch.randn(s[0], N if s[1] == 6 else s[1], D, generator=g),), {}))


@case(as_long, experts=1, moe=0)
def plain_heads_in_lists():
    return ListedHeads(together=False)


@case(as_long, experts=1, moe=0)
def plain_heads_in_lists_stacked():
    return ListedHeads(together=True)

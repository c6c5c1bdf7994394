"""Experts that pick among the features of their row: by rank, by place, by a code, or two features at a time."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, seq
from tests.zoo.row_functions import HID, D, N, Routed


class UpDown(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, HID), nn.Linear(HID, D)

    def forward(self, x):
        return self.down(self.kept(self.up(x)))


class Winners(UpDown):
    """The six largest neurons fire, all others are silent."""

    def kept(self, h):
        values, places = h.topk(6, -1)
        return torch.zeros_like(h).scatter(-1, places, values.relu())


class AboveRank(UpDown):
    """Neurons by their rank, which two argsorts give."""

    def kept(self, h):
        return h * (h.argsort(-1).argsort(-1) >= HID // 2)


class RanksAlone(UpDown):
    def kept(self, h):
        return h.argsort(-1).argsort(-1).to(h.dtype) / HID


class AboveKth(UpDown):
    def kept(self, h):
        return torch.where(h > h.kthvalue(8, -1, keepdim=True).values, h, torch.zeros_like(h))


class Centred(UpDown):
    def kept(self, h):
        return (h - h.median(-1, keepdim=True).values).relu()


class ByTheLargest(UpDown):
    def kept(self, h):
        return h / h.abs().max(-1, keepdim=True).values.clamp(min=1e-4)


class Shuffled(UpDown):
    """Neurons in an order of each expert's own, which a buffer holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.randperm(HID))

    def kept(self, h):
        return F.silu(h)[:, self.order].cumsum(-1)


class Gathered(Shuffled):
    def kept(self, h):
        return F.silu(h).gather(-1, self.order.expand(len(h), -1))


class Codebook(nn.Module):
    """The row's code is the neuron that is largest, the output the code's vector."""

    def __init__(self):
        super().__init__()
        self.code, self.book = nn.Linear(D, HID), nn.Embedding(HID, D)

    def forward(self, x):
        return self.book(self.code(x).argmax(-1))


class Pairs(nn.Module):
    """Products of two features each, as in ``nn.Bilinear``."""

    def __init__(self):
        super().__init__()
        self.narrow, self.pairs = nn.Linear(D, 6), nn.Bilinear(6, 6, D)

    def forward(self, x):
        narrow = self.narrow(x)
        return self.pairs(narrow, narrow.tanh())


class FromAVector(nn.Module):
    """Each expert is a short vector, of which one network for all makes its two matrices."""

    def __init__(self, n=N):
        super().__init__()
        self.router = nn.Linear(D, n)
        self.vectors = nn.Parameter(torch.randn(n, 5) * 0.4)
        self.make_up, self.make_down = nn.Linear(5, D * 12), nn.Linear(5, 12 * D)

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, chosen = self.router(rows).softmax(-1).topk(2, dim=-1)
        total = torch.zeros_like(rows)
        for number, vector in enumerate(self.vectors):
            token, slot = torch.where(chosen == number)
            hidden = F.silu(rows[token] @ self.make_up(vector).view(D, 12))
            total.index_add_(0, token, hidden @ self.make_down(vector).view(12, D) * weights[token, slot, None])
        return total.view_as(x)


def register(name, make):
    def build():
        return make()

    build.__name__ = name
    case(seq(D), experts=N)(build)


for _expert in (Winners, AboveRank, RanksAlone, AboveKth, Centred, ByTheLargest, Shuffled, Gathered, Codebook, Pairs):
    register(f"features_{_expert.__name__.lower()}", lambda expert=_expert: Routed(expert))
register("features_weights_from_a_vector", FromAVector)

"""Two mixtures in one module, on one router; experts that are chosen by what or where a token is; weights that are
summed before they multiply."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, made_by, seq

D, HID, N = 16, 24, 4


def ffn():
    return nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D))


class Pair(nn.Module):
    """Two lists of experts take the same rows; ``join`` is what differs below."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, N)
        self.values, self.gates = (nn.ModuleList(ffn() for _ in range(N)) for _ in range(2))

    def join(self, rows, y, z):
        return y, z.tanh()

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        y, z = torch.zeros_like(rows), torch.zeros_like(rows)
        for number, experts in enumerate(zip(self.values, self.gates, strict=True)):
            row, slot = torch.where(ids == number)
            for total, expert in zip((y, z), experts, strict=True):
                total.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return self.join(rows, y, z)


@case(seq(D), experts=N, moe=2)
def beside_two_results():
    return Pair()


class Gated(Pair):
    """One mixture gates the other, and a network of the experts' shape serves every token."""

    def __init__(self):
        super().__init__()
        self.shared = ffn()

    def join(self, rows, y, z):
        return y * z.sigmoid() + self.shared(rows)


@case(seq(D), experts=N, moe=2)
def beside_gated_mixtures():
    return Gated()


class Modalities(nn.Module):
    """What a token is picks its expert, whose rows are added where the shared network's result lies."""

    def __init__(self):
        super().__init__()
        self.experts, self.shared = nn.ModuleDict({name: ffn() for name in ("text", "image", "sound")}), ffn()

    def forward(self, x, kinds):
        y = self.shared(x)
        for number, expert in enumerate(self.experts.values()):
            mine = kinds == number
            if mine.any():
                y[mine] = y[mine] + expert(x[mine])
        return y


def with_kinds(size, generator):
    return (torch.randn(*size, D, generator=generator), torch.randint(3, size, generator=generator)), {}


@case(made_by(with_kinds), experts=3)
def beside_modalities():
    return Modalities()


class Places(nn.Module):
    """The first tokens of a sequence have a network of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = ffn(), ffn()

    def forward(self, x):
        return torch.cat([self.first(x[:, :1]), self.rest(x[:, 1:])], 1)


@case(seq(D), experts=2, expect="declined", reason="its experts serve fixed places of a sequence")
def beside_places():
    return Places()


class Blended(nn.Module):
    """Three layers, each with the matrix that the gate makes of four."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(D, 8), nn.ELU(), nn.Linear(8, N))
        sizes = (D, HID, HID, D)
        self.layers = nn.ParameterList(torch.randn(N, b, a) / 4 for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x):
        shares, h = self.gate(x).softmax(-1), x[..., None]
        for number, layer in enumerate(self.layers):
            h = torch.bmm(torch.einsum("be,eoi->boi", shares, layer), h if number == 0 else F.elu(h))
        return h[..., 0]


@case(
    flat(D), experts=N, expect="declined", reason=r"adds up its experts' matrices \(layers.0\) for each sample or token"
)
def beside_blended_matrices():
    return Blended()


class Bag(nn.Module):
    """Rows of a table, picked by products of halves of a key, weighed and added up by the table itself."""

    def __init__(self):
        super().__init__()
        self.query, self.keys = nn.Linear(D, 16), nn.Parameter(torch.randn(2, 4, 8))
        self.values = nn.EmbeddingBag(16, D, mode="sum")

    def forward(self, x):
        halves = self.query(x.reshape(-1, D)).chunk(2, -1)
        (a, i), (b, j) = ((half @ key.t()).topk(2) for half, key in zip(halves, self.keys, strict=True))
        score, place = (a[:, :, None] + b[:, None]).flatten(1).topk(2)
        ids = (i[:, :, None] * 4 + j[:, None]).flatten(1).gather(1, place)
        return self.values(ids, per_sample_weights=score.softmax(-1)).view_as(x)


@case(seq(D), experts=2, expect="declined", moe=None, reason="it is a memory: each id that the router picks is one row")
def beside_bag_of_values():
    return Bag()

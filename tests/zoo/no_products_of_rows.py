"""Mixtures whose experts are no products of picked rows: groups of neurons, vectors, rows of a memory, blended poses;
an honest compiler lists each, and says which it is."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, made_by, seq

D, HID, N = 16, 32, 4


def stack(*sizes):
    return nn.Parameter(torch.randn(*sizes) / 4)


class Masked(nn.Module):
    """A dense FFN of which a router keeps two groups of neurons for each token (MoEfication); ``mask`` differs."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.router = nn.Linear(D, HID), nn.Linear(HID, D), nn.Linear(D, N, bias=False)

    def chosen(self, x):
        return self.router(x).topk(2)[1]

    def forward(self, x):
        return self.down(self.up(x).relu() * self.mask(x))


class ByPattern(Masked):
    """Groups as a clustering gave them: a table of which neuron is in which."""

    def __init__(self):
        super().__init__()
        self.register_buffer("groups", F.one_hot(torch.arange(HID) % N, N).t().float())

    def mask(self, x):
        return F.embedding(self.chosen(x), self.groups).sum(-2)


class ByPlace(Masked):
    """Groups of neighbours."""

    def mask(self, x):
        kept = torch.zeros(*x.shape[:-1], N).scatter(-1, self.chosen(x), 1.0)
        return kept.repeat_interleave(HID // N, -1)


@case(seq(D), experts=N, expect="declined", reason="groups of the 32 hidden neurons of one FFN")
def neurons_by_a_table():
    return ByPattern()


@case(seq(D), experts=N, expect="declined", reason="groups of the 32 hidden neurons of one FFN")
def neurons_by_their_place():
    return ByPlace()


class Largest(Masked):
    """The largest neurons of each token: no router, and no mixture."""

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h * torch.zeros_like(h).scatter(-1, h.topk(4)[1], 1.0))


@case(seq(D), experts=N, expect="declined", moe=0)
def neurons_that_are_largest():
    return Largest()


class Scaled(nn.Module):
    """Vectors that scale the hidden neurons, mixed for each token (mixture of IA3 vectors)."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.router = nn.Linear(D, HID), nn.Linear(HID, D), nn.Linear(D, N)
        self.vectors = stack(N, HID)

    def vector(self, x):
        return self.router(x).softmax(-1) @ self.vectors

    def forward(self, x):
        return self.down(self.up(x).relu() * self.vector(x))


class ScaledByTwo(Scaled):
    def vector(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        return (weights[..., None] * self.vectors[ids]).sum(-2)


@case(seq(D), experts=N, expect="declined", reason="its experts are vectors, the rows of vectors")
def vectors_of_a_gate():
    return Scaled()


@case(seq(D), experts=N, expect="declined", reason="its experts are vectors, the rows of vectors")
def vectors_of_two_choices():
    return ScaledByTwo()


class NearestCode(nn.Module):
    """Each row decoded from the nearest of some codes, and gated: the codes choose themselves (vector quantisation)."""

    def __init__(self):
        super().__init__()
        self.codes = stack(N, D)
        self.gate, self.up, self.down = nn.Linear(D, HID), nn.Linear(D, HID), nn.Linear(HID, D)

    def choice(self, x):
        return torch.cdist(x, self.codes).argmin(-1)

    def forward(self, x):
        code = self.codes[self.choice(x)]
        return self.down(F.silu(self.gate(code)) * self.up(code))


class GreedyToken(NearestCode):
    """The token that a head finds likeliest, looked up again and fed to a gated layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, N)

    def choice(self, x):
        return self.head(x).argmax(-1)


@case(seq(D), experts=N, expect="declined", moe=0)
def nearest_codes():
    return NearestCode()


@case(seq(D), experts=N, expect="declined", moe=0)
def greedy_token():
    return GreedyToken()


class Phase(nn.Module):
    """Matrices blended between the two nearest of four poses (phase functioned networks)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = stack(N, HID, D), stack(N, D, HID)

    def forward(self, x, phase):
        place = phase * N
        low, part = place.long() % N, (place % 1.0)[:, None, None]

        def blended(weight):
            return weight[low] * (1 - part) + weight[(low + 1) % N] * part

        hidden = F.elu(torch.bmm(blended(self.first), x[..., None]))
        return torch.bmm(blended(self.second), hidden)[..., 0]


def a_phase_each(size, generator):
    return (torch.randn(*size, D, generator=generator)[0], torch.rand(size[1], generator=generator)), {}


@case(made_by(a_phase_each), experts=N, expect="declined", reason="adds up its experts' matrices .* for each sample")
def blended_by_a_phase():
    return Phase()


class Bagged(nn.Module):
    """A product-key memory whose rows a bag weighs, and a projection behind it."""

    def __init__(self, side=5):
        super().__init__()
        self.side, self.query, self.out = side, nn.Linear(D, 8), nn.Linear(D, D)
        self.keys, self.values = stack(2, side, 4), nn.EmbeddingBag(side * side, D, mode="sum")

    def forward(self, x):
        halves = self.query(x.reshape(-1, D)).chunk(2, -1)
        (a, i), (b, j) = ((half @ keys.t()).topk(2) for half, keys in zip(halves, self.keys, strict=True))
        pairs = (i[:, :, None] * self.side + j[:, None]).flatten(1)
        scores, best = (a[:, :, None] + b[:, None]).flatten(1).topk(3)
        mixed = self.values(pairs.gather(1, best), per_sample_weights=scores.softmax(-1))
        return self.out(mixed).view_as(x)


@case(seq(D), experts=25, expect="declined", reason="it is a memory: each id that the router picks is one row")
def memory_of_a_bag():
    return Bagged()

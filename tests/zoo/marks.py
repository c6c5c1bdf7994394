"""Arguments and Parameters that do nothing at the values of the example: a mask of ones, a scale of ones."""

import torch
from torch import nn

from tests.zoo.case import case, made_by

H, I, E, K = 16, 24, 4, 2


def marked(other):
    """(x, mask): the first call's mask is all ones, as it is where nothing is padded; later ones have both values."""

    def make(shape, g):
        x, drawn = torch.randn(*shape, H, generator=g), torch.rand(shape, generator=g) < 0.6
        return (x, other(drawn | (shape == (2, 6)))), {}

    return made_by(make)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E))

    def mix(self, x, seen, keep=None):
        weights, ids = self.gate(x).softmax(-1).topk(K)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            part = expert(seen[t]) * weights[t, k, None]
            y.index_add_(0, t, part if keep is None else part * keep[t, None])
        return y


class PaddedRowsZeroed(Base):
    def forward(self, x, mask):
        flat = x.reshape(-1, H)
        return self.mix(flat, flat * mask.reshape(-1, 1).to(flat.dtype)).view(x.shape)


@case(marked(lambda mask: mask.long()), experts=E)
def marks_padded_rows_zeroed_by_integers():
    return PaddedRowsZeroed()


@case(marked(lambda mask: mask), experts=E)
def marks_padded_rows_zeroed_by_flags():
    return PaddedRowsZeroed()


class PaddedRowsLeftOut(Base):
    def forward(self, x, mask):
        y = torch.zeros_like(x)
        kept = x[mask]
        y[mask] = self.mix(kept, kept)
        return y


@case(marked(lambda mask: mask), experts=E, expect="either")
def marks_padded_rows_left_out():
    return PaddedRowsLeftOut()


class ResultsMasked(Base):
    def forward(self, x, mask):
        flat = x.reshape(-1, H)
        return self.mix(flat, flat, mask.reshape(-1).to(flat.dtype)).view(x.shape)


@case(marked(lambda mask: mask), experts=E, expect="either")
def marks_results_masked_inside_the_loop():
    return ResultsMasked()


class PaddingToken(Base):
    """Token ids in; 0 is padding, and the example has none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, H)

    def forward(self, ids):
        x = self.embed(ids).reshape(-1, H)
        return self.mix(x, x * (ids != 0).reshape(-1, 1)).view(*ids.shape, H)


@case(
    made_by(lambda s, g: ((torch.randint(1 if s == (2, 6) else 0, 30, s, generator=g),), {})), experts=E,
    expect="either",
)  # fmt: skip
def marks_padding_token_that_the_example_lacks():
    return PaddingToken()


class Scaled(Base):
    """A Parameter that is one until it is trained."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(E))

    def mix(self, x, seen, keep=None):
        weights, ids = self.gate(x).softmax(-1).topk(K)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(seen[t]) * self.scale[e] * weights[t, k, None])
        return y

    def forward(self, x):
        flat = x.reshape(-1, H)
        return self.mix(flat, flat).view(x.shape)


@case(
    made_by(lambda s, g: ((torch.randn(*s, H, generator=g),), {})), experts=E, expect="declined",
    reason=r"scale is part of what it computes and changes nothing at its present values \(all 1\)",
)  # fmt: skip
def marks_scale_of_ones():
    return Scaled()


class HalvedByGlu(Base):
    """``nn.GLU``: the second half gates the first."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 2 * I), nn.GLU(), nn.Linear(I, H)) for _ in range(E))

    def forward(self, x):
        flat = x.reshape(-1, H)
        return self.mix(flat, flat).view(x.shape)


@case(made_by(lambda s, g: ((torch.randn(*s, H, generator=g),), {})), experts=E)
def expert_halved_by_glu():
    return HalvedByGlu()

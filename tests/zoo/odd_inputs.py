"""Plain mixtures on awkward inputs: one token, none, ties, strides, padding, chunks."""

import torch
import torch.nn.functional as F

from tests.zoo.branches import Moe
from tests.zoo.case import case, seq


class PaddedToEight(Moe):
    """Tokens are padded to a multiple of eight, and the padding is cut off again."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        n = h.shape[0]
        h = F.pad(h, (0, 0, 0, -n % 8))
        return self.loop(h, *self.route(h))[:n].view_as(x)


# How much it pads depends on the number of tokens modulo eight, which is no formula of the shape.
@case(
    seq(20),
    experts=4,
    expect="declined",
    reason="pads rows by .*no simple function of the input's shape .up to a multiple",
)
def branch_padded_to_eight():
    return PaddedToEight()


class Chunked(Moe):
    """Tokens go through in chunks of four to save memory: one MoE module, many small loops."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        return torch.cat([self.loop(c, *self.route(c)) for c in h.split(4)]).view_as(x)


@case(seq(20), experts=4, expect="either", moe=None)
def branch_chunked_tokens():
    return Chunked()


class SequenceFirst(Moe):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@case(seq(20), experts=4)
def branch_sequence_first():
    return SequenceFirst()


def one_token_first(i):
    shape = [(1, 1), (2, 6), (1, 2), (4, 5), (1, 1)][i % 5]
    return (torch.randn(*shape, 20, generator=torch.Generator().manual_seed(70 + i)),), {}


@case(one_token_first, experts=8)
def branch_example_of_one_token():
    return Moe(n=8)


def ties(i):
    shape = [(2, 6), (1, 3), (2, 2), (1, 9)][i % 4]
    x = torch.randn(*shape, 20, generator=torch.Generator().manual_seed(i))
    return (x.round() if i % 2 else torch.zeros_like(x) if i else x,), {}


@case(ties, experts=4)
def branch_zeros_and_ties():
    return Moe()


def no_tokens(i):
    shape = [(2, 6), (0, 6), (2, 0), (1, 3)][i % 4]
    return (torch.randn(*shape, 20, generator=torch.Generator().manual_seed(i)),), {}


@case(no_tokens, experts=4)
def branch_no_tokens_at_all():
    return Moe()


def strided(i):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(20, 3 + i, 2, generator=g).permute(2, 1, 0)
    return (x[:, ::2] if i % 2 else x,), {}


@case(strided, experts=4)
def branch_strided_inputs():
    return Moe()

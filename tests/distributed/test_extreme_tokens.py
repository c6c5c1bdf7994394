"""Tokens at the ends of their dtype: what a rank adds that has no experts, and what ranks compare of their tokens."""

from types import SimpleNamespace

import pytest
import torch

from moeopt.distributed.agreed_ids import agreed_ids
from moeopt.distributed.channel import Channel
from moeopt.distributed.forward import RankExperts
from moeopt.distributed.homes import ExpertHomes
from moeopt.errors import RankLostError
from moeopt.ir.specs import ExpertsSpec


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 3000.0), (torch.float32, 3e38), (torch.bfloat16, float("inf")), (torch.float32, float("nan"))],
)
def test_a_rank_without_experts_adds_zeros_whatever_the_tokens_are(dtype, value):
    """64 numbers of 3000 are more than float16 holds: infinity times zero once reached every rank."""
    bank = RankExperts(SimpleNamespace(homes=ExpertHomes([[0]], 2), width=5), None, [])
    x = torch.full((3, 64), value, dtype=dtype, requires_grad=True)
    ids, weights = torch.full((3, 2), -1), torch.ones(3, 2, dtype=dtype)
    y = bank._compute(ExpertsSpec(), False, x, ids, weights, torch.float32)
    assert y.shape == (3, 5) and y.dtype == torch.float32 and not y.any()
    y.sum().backward()
    assert not x.grad.any()


def two_ranks(other):
    """A channel on which this rank is 0 and rank 1 tells what ``other`` makes of the same."""
    channel = SimpleNamespace(
        size=2, ranks=[0, 1], everyones=lambda phase, x: torch.stack([x, other(x)]),
        lose=lambda rank, reason: RankLostError(rank, "", "comparing", reason),
    )  # fmt: skip
    channel.compare = lambda told, names: Channel.compare(channel, told, names)
    return channel


@pytest.mark.parametrize("value", [1.0, 1e30, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_tokens_are_alike_however_large(dtype, value):
    x = torch.full((40, 96), value, dtype=dtype) * torch.linspace(0.5, 1, 96).to(dtype)
    ids, weights = torch.randint(0, 4, (40, 2)), torch.rand(40, 2).to(dtype)
    assert torch.equal(agreed_ids(two_ranks(lambda told: told.clone()), x, ids, weights), ids)


def test_float64_tokens_whose_sums_overflow():
    x = torch.full((40, 96), 1.7e308, dtype=torch.float64)
    ids = torch.zeros(40, 2, dtype=torch.int64)
    assert torch.equal(agreed_ids(two_ranks(torch.clone), x, ids, torch.ones(40, 2)), ids)


@pytest.mark.parametrize("value", [1.0, 1e-25, 1e25])
def test_tokens_that_differ_by_rounding_are_alike_however_small(value):
    """In float32 the squares of 1e-25 vanish, and what is far from a norm of nothing is everything."""
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * value
    ids = torch.zeros(40, 2, dtype=torch.int64)

    def other(told):
        return torch.cat([told[:2], told[2:] * (1 + 1e-6)])

    assert torch.equal(agreed_ids(two_ranks(other), x, ids, torch.ones(40, 2)), ids)


def test_other_tokens_are_told():
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))

    def other(told):
        changed = told.clone()
        changed[3:] *= -1
        return changed

    with pytest.raises(RankLostError, match=r"rank 1 disagrees: its tokens is others there and alike elsewhere"):
        agreed_ids(two_ranks(other), x, torch.zeros(40, 2, dtype=torch.int64), torch.ones(40, 2))

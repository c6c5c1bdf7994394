"""Measures of imbalance against values worked out by hand, and quantiles against sorted data."""

import math

import pytest
import torch

from moeopt.profiling.histogram import AMOUNTS, SHARES, Histogram
from moeopt.profiling.statistics import imbalance, top_pairs


def test_measures_by_hand():
    at = imbalance(torch.tensor([6, 2, 0, 0]), tokens=4)
    assert (at["mean"], at["max_over_mean"], at["dead"], at["hot"]) == (2.0, 3.0, [2, 3], [0])
    assert at["cv"] == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert at["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    # p = 8 / (4 * 4): each expert is missed by a token with probability 1/2
    assert at["by_chance"] == {"cv": pytest.approx(math.sqrt(0.5 / 2)), "dead": pytest.approx(4 / 16)}


def test_balance_one_expert_and_nothing():
    even = imbalance(torch.tensor([5, 5, 5]), tokens=15)
    assert (even["max_over_mean"], even["cv"], even["hot"], even["dead"]) == (1.0, 0.0, [], [])
    assert even["entropy"] == pytest.approx(1.0)
    assert imbalance(torch.tensor([7]), tokens=7)["entropy"] == 1.0
    assert imbalance(torch.tensor([0, 0]), tokens=0) is None


def test_hot_is_more_than_twice_the_mean():
    assert imbalance(torch.tensor([4, 2, 1, 1]), tokens=8)["hot"] == []
    assert imbalance(torch.tensor([5, 1, 1, 1]), tokens=8)["hot"] == [0]


def test_chance_is_what_random_tokens_show():
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(2000, 32, generator=generator).topk(2).indices
    at = imbalance(torch.bincount(ids.flatten(), minlength=32), tokens=2000)
    # the spread of 32 experts' loads is itself random: within 3 / sqrt(2 * 32) of its own size
    assert at["cv"] == pytest.approx(at["by_chance"]["cv"], rel=3 / math.sqrt(64))


def test_pairs():
    together = torch.tensor([[9, 4, 0], [4, 9, 2], [0, 2, 9]])
    assert top_pairs(together) == [
        {"experts": [0, 1], "tokens": 4, "over_mean": 2.0},
        {"experts": [1, 2], "tokens": 2, "over_mean": 1.0},
    ]
    assert top_pairs(torch.tensor([[3]])) == [] and top_pairs(torch.diag(torch.tensor([1, 2]))) == []


@pytest.mark.parametrize(("edges", "width"), [(SHARES, 0.005), (AMOUNTS, 0.022)])
def test_quantiles_are_within_a_bin(edges, width):
    values = torch.rand(5000, generator=torch.Generator().manual_seed(1)) ** 2
    seen = Histogram(edges)
    for part in values.split(700):
        seen.add(part)
    summary = seen.summary()
    assert summary["mean"] == pytest.approx(values.double().mean().item())
    assert (summary["min"], summary["max"]) == (values.min().item(), values.max().item())
    for name, level in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        exact = values.quantile(level).item()
        # a bin's width, absolute for shares and relative for amounts
        assert summary[name] == pytest.approx(exact, **({"abs": width} if edges is SHARES else {"rel": width}))


def test_constant_and_outlying_values():
    seen = Histogram(AMOUNTS)
    assert seen.summary() is None and math.isnan(seen.quantile(0.5))
    seen.add(torch.full((4,), 2.5))
    assert set(seen.summary().values()) == {2.5}
    seen.add(torch.tensor([1e9, 1e-9]))
    assert (seen.summary()["min"], seen.summary()["max"]) == (pytest.approx(1e-9), 1e9)

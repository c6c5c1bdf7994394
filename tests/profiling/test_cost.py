"""The balanced routing that the observed one is timed against, and what a timing reports."""

import torch

from moeopt.html import ratio
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.profiling.cost import CALLS, RoutingCost, _noise, balanced

SPEC = ExpertsSpec(rows="plain", activation="relu")


def test_every_expert_gets_its_share_and_no_token_the_same_expert_twice():
    ids = torch.zeros(10, 3, dtype=torch.int64)
    even = balanced(ids, 8)
    counts = torch.bincount(even.flatten(), minlength=8)
    assert counts.max() - counts.min() <= 1 and even.dtype == ids.dtype
    assert all(len(set(row)) == 3 for row in even.tolist())


def test_slots_that_name_no_expert_stay():
    ids = torch.tensor([[0, -1], [9, 0], [0, 0]])
    assert balanced(ids, 4).tolist() == [[0, -1], [9, 1], [2, 3]]


def test_a_timing_reports_means_and_experts_hit():
    bank = StackedExpertWeights([torch.ones(4, 8, 8)], torch.ones(4, 8, 8))
    cost, ids = RoutingCost(), torch.zeros(6, 2, dtype=torch.int64)
    assert cost.summary() is None and not cost.wants(ids[:0])
    for _ in range(2):
        assert cost.wants(ids)
        cost.measure(torch.ones(6, 8), ids, torch.ones(6, 2), bank, SPEC)
    found = cost.summary()
    assert (found["calls"], found["tokens"]) == (2, 6) and found["observed_seconds"] > 0
    assert (found["experts_hit_observed"], found["experts_hit_balanced"]) == (1, 4)
    assert found["ratio"] == found["observed_seconds"] / found["balanced_seconds"]
    assert found["noise"] >= 0
    cost.calls = CALLS
    assert not cost.wants(ids)


def test_noise_is_how_far_equal_timings_are_apart():
    assert _noise([3.0, 2.0, 4.0, 9.0]) == 0.5  # 3 against 2: every other one
    assert _noise([1.0, 1.0]) == 0 and _noise([0.0, 1.0]) == float("inf")
    cost = RoutingCost()
    cost.calls, cost.tokens, cost.observed, cost.balanced, cost.noise = 1, 4, 1.2, 1.0, 0.25
    assert ratio(cost.summary()) == "~1"
    cost.noise = 0.15
    assert ratio(cost.summary()) == "1.20x"
    cost.noise = float("inf")
    assert cost.summary() is None

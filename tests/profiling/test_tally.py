"""Counts of one block against routing that was counted by hand: every slot is one thing and one only."""

import pytest
import torch

from moeopt.profiling.tally import CHUNK, Tally

IDS = torch.tensor([[0, 1], [1, 2], [1, 1], [-1, 3], [5, 0], [2, 3]])
WEIGHTS = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.0, 1.0], [0.3, 0.7], [0.0, 0.25]])
# by token:  0 and 1;  1 and 2;  1 twice;  3 (a slot < 0);  0 (a slot >= 4);  3 (a slot of weight 0)
FIRED = [2, 4, 1, 2]
TOGETHER = [[2, 1, 0, 0], [1, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 2]]


def tally(*calls, experts=4):
    made = Tally("block", experts)
    for ids, weights in calls:
        made.add(ids, weights)
    return made


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts_are_those_made_by_hand(dtype):
    t = tally((IDS.to(dtype), WEIGHTS))
    assert (t.fired.tolist(), t.together.tolist()) == (FIRED, TOGETHER)
    assert (t.calls, t.tokens, t.slots, t.negative, t.beyond, t.zero_weight, t.without) == (1, 6, 12, 1, 1, 1, 0)
    assert t.slots == sum(FIRED) + t.negative + t.beyond + t.zero_weight


def test_calls_of_different_sizes_add_up():
    t = tally((IDS[:1], WEIGHTS[:1]), (IDS[1:4], WEIGHTS[1:4].bfloat16()), (IDS[4:], WEIGHTS[4:]))
    assert (t.calls, t.fired.tolist(), t.together.tolist()) == (3, FIRED, TOGETHER)


def test_no_tokens_and_no_slots():
    t = tally((torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)), (torch.zeros(3, 0, dtype=torch.int64),) * 2)
    assert (t.calls, t.tokens, t.slots, t.without, t.fired.sum().item()) == (2, 3, 0, 3, 0)
    assert t.mass.summary() is None and t.share.summary() is None


def test_a_token_without_an_expert_is_counted_and_has_no_confidence():
    t = tally((torch.tensor([[-1, -1], [0, 1]]), torch.tensor([[0.5, 0.5], [0.75, 0.25]])))
    assert t.without == 1 and t.mass.count == 1
    assert t.mass.summary()["mean"] == 1.0 and t.share.summary()["mean"] == 0.75 and t.margin.summary()["mean"] == 0.5


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -0.5])
def test_odd_weights_fire_and_have_no_confidence(odd):
    t = tally((torch.tensor([[0, 1]]), torch.tensor([[odd, 0.5]])))
    assert t.fired.tolist() == [1, 1, 0, 0] and t.mass.summary() is None


def test_one_slot_a_token_has_a_mass_and_no_margin():
    t = tally((torch.tensor([[0], [3]]), torch.tensor([[0.25], [0.75]])))
    assert t.mass.summary()["mean"] == 0.5 and t.margin.summary() is None


def test_more_tokens_than_one_chunk():
    ids = torch.arange(CHUNK + 5)[:, None] % 4
    t = tally((torch.cat([ids, (ids + 1) % 4], 1), torch.ones(CHUNK + 5, 2)))
    assert t.together.diagonal().sum() == 2 * (CHUNK + 5) == t.fired.sum()
    assert t.together[0, 2] == 0 and t.together[0, 1] + t.together[0, 3] == t.together[0, 0]


def test_a_dense_table_counts_its_nonzero_weights():
    weights = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])
    t = tally((torch.arange(3).expand(2, 3), weights), experts=3)
    assert t.fired.tolist() == [1, 1, 1] and t.zero_weight == 3 and t.margin.count == 1

"""Two forms in turn: medians, what pays, and the words."""

import itertools

import pytest
import torch

from moeopt.pipeline import autotune as measure
from moeopt.pipeline.autotune import CALLS, Timing, in_turn, pays


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the functions add to it."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return now


def taking(clock, seconds):
    costs = itertools.chain(seconds, itertools.repeat(seconds[-1]))

    def run(x):
        clock[0] += next(costs)

    return run


def test_medians_without_the_warm_up(clock):
    before, after = taking(clock, [9, 9, 0.01, 5, 0.02]), taking(clock, [9, 9, 0.5, 0.001])
    timing = in_turn(before, after, ((torch.zeros(2, 3),), {}), 2, 1000)
    assert timing.tokens == 2 and timing.before == pytest.approx(0.02) and timing.after == pytest.approx(0.001)


def test_long_calls_are_made_three_times(clock):
    made = []
    in_turn(
        lambda x: (made.append(1), clock.__setitem__(0, clock[0] + 5)), lambda x: None, ((torch.ones(1),), {}), 1, 0
    )
    assert len(made) == 2 + 3 < 2 + CALLS


@pytest.mark.parametrize(
    ("ratios", "answer"),
    [([1.06], True), ([1.04], False), ([1.2, 1.0], True), ([1.5, 0.96], False), ([1.5, 0.98], True), ([1.0], False)],
)
def test_what_pays(ratios, answer):
    assert pays([Timing(1, ratio, 1.0) for ratio in ratios]) is answer


def test_words():
    assert str(Timing(1, 0.00128, 0.00131)) == "1.31 ms, as it is 1.28 ms at 1 token"
    assert str(Timing(128, 0.5, 0.25)) == "250 ms, as it is 500 ms at 128 tokens"

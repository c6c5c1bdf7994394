"""The expected counts are those of enumeration, where all choices can be listed."""

import itertools
import math

import pytest

from moeopt.planning.counting import busiest, experts_hit, most_held, owners_reached, remote_owners


def listed(E, K, P):
    """Mean number of owners of a token's K different experts, over all choices; experts e of owner e * P // E."""
    choices = list(itertools.combinations(range(E), K))
    return sum(len({e * P // E for e in choice}) for choice in choices) / len(choices)


@pytest.mark.parametrize(
    ("E", "K", "P"),
    [(8, 2, 4), (8, 3, 2), (12, 4, 3), (6, 6, 3), (8, 1, 8), (8, 4, 1), (6, 2, 4), (7, 3, 3), (4, 2, 9)],
)
def test_owners_of_a_token(E, K, P):
    assert owners_reached(E, K, P) == pytest.approx(listed(E, K, P))
    assert remote_owners(E, K, P) == pytest.approx(listed(E, K, P) * (P - 1) / P)


@pytest.mark.parametrize(("E", "P"), [(8, 4), (6, 4), (128, 7), (4, 9)])
def test_the_most_that_an_owner_has(E, P):
    held = [e * P // E for e in range(E)]
    assert most_held(E, P) == max(held.count(r) for r in range(P)) / E


def test_experts_that_a_batch_hits():
    assert experts_hit(8, 2, 1) == pytest.approx(2)
    assert experts_hit(8, 8, 1) == 8
    # two tokens of two experts out of four: each expert is missed by both with probability 1/4
    assert experts_hit(4, 2, 2) == pytest.approx(3)


def test_the_busiest_count_is_above_the_mean_and_nothing_is_nothing():
    assert busiest(0) == 0 and busiest(100) == 100 + 2.5 * math.sqrt(100)

"""Every expert is placed, no device holds more than its share, and load-aware placements are worth it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt.planning.placement import balanced, busiest_rank, contiguous, together, with_copies

LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


def held(placement, P):
    return [sum(rank in ranks for ranks in placement) for rank in range(P)]


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(LOADS, st.integers(1, 9), st.integers(0, 12))
def test_each_expert_has_a_place_and_each_device_its_share(load, P, extra):
    for placement, copies in (
        (contiguous(len(load), P), len(load)),
        (balanced(load, P), len(load)),
        (with_copies(load, P, extra), len(load) + extra),
    ):
        assert len(placement) == len(load) and all(placement)
        assert all(0 <= rank < P for ranks in placement for rank in ranks)
        assert sum(map(len, placement)) == copies
        assert max(held(placement, P)) <= -(-copies // P)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_placement_by_co_activation_fills_nodes_evenly(nodes, node, seed):
    r = np.random.default_rng(seed)
    P, E = nodes * node, 4 * nodes * node
    load = r.integers(0, 100, E)
    pairs = r.integers(0, 10, (E, E))
    placement = together(load, pairs + pairs.T, P, node, extra=nodes)
    assert sum(map(len, placement)) == E + nodes
    homes = [{rank // node for rank in ranks} for ranks in placement]
    assert all(len(home) == 1 for home in homes)  # copies stay in the node of their expert
    assert max(np.bincount([h for home in homes for h in home])) == E // nodes


def test_neighbours_on_one_device():
    assert contiguous(6, 3) == [[0], [0], [1], [1], [2], [2]]
    assert contiguous(6, 4) == [[0], [0], [1], [1], [2], [3]]
    assert contiguous(2, 4) == [[0], [1]]


def test_the_hottest_expert_is_copied_and_the_load_evens_out():
    load = [100, 10, 10, 10, 10, 10, 10, 10]
    assert busiest_rank(contiguous(8, 4), load, 4) == pytest.approx(110 / 42.5)
    assert busiest_rank(balanced(load, 4), load, 4) == pytest.approx(110 / 42.5)
    copied = with_copies(load, 4, 4)
    assert len(copied[0]) == 4 and len(set(copied[0])) == 4
    assert busiest_rank(copied, load, 4) < 1.2


def test_experts_of_one_topic_share_a_node():
    """Two topics of four experts each: pairs of one topic occur, pairs across do not."""
    topic = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    pairs = 100 * (topic[:, None] == topic[None, :])
    placement = together([50] * 8, pairs, 4, 2)
    nodes = np.array([ranks[0] // 2 for ranks in placement])
    assert len({(t, n) for t, n in zip(topic, nodes, strict=True)}) == 2


def test_no_load_at_all():
    assert busiest_rank(contiguous(4, 2), [0, 0, 0, 0], 2) == 1.0

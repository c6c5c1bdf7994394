"""The sorted form: blocks that hold any routing, and how many there are."""

import pytest
import torch

from moeopt.backends.tensorrt.lowerings.sort import STEP, Sort, blocks_of
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, model_of, run, session_of, tokens

BUDGET = 32  # as in test_forms.py


def filled(counts, rows):
    return sum(-(-count // rows) for count in counts)


@pytest.mark.parametrize("pairs", [0, 1, 2, 63, 64, 65, 400, 1000])
@pytest.mark.parametrize("experts", [1, 3, 16])
def test_the_blocks_hold_every_routing_and_no_fewer_would(pairs, experts):
    blocks, rows = blocks_of(pairs, experts)
    assert rows % STEP == 0 and blocks <= 2 * experts
    hit = min(pairs, experts)
    worst = [1] * hit  # one pair for each expert, and all others where they begin blocks
    if hit:
        worst[0] += pairs - hit
    assert filled(worst, rows) <= blocks
    assert blocks == max(1, max(filled(c, rows) for c in splits(pairs, experts)))


def splits(pairs, experts):
    """Counts of pairs by expert, those that fill the most blocks among them."""
    rows = blocks_of(pairs, experts)[1]
    counts, left = [0] * experts, pairs
    for e in range(experts):
        counts[e], left = (1, left - 1) if left else (0, 0)
    for e in range(experts):
        step = left // rows * rows
        counts[e], left = counts[e] + step, left - step
    counts[0] += left
    yield counts
    yield [pairs] + [0] * (experts - 1)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 200])
def test_blocks_of_more_than_one_step(T):
    site = make_site(E=3)
    session = session_of(model_of(site, Sort()))
    x, ids, w = tokens(site, T, beyond=0.1, negative=0.1)
    for routing in (ids, torch.zeros_like(ids), torch.full_like(ids, 2), torch.arange(2 * T).reshape(T, 2) % 3):
        assert eps_off(run(session, x, routing, w), exact(site, x, routing, w)) <= BUDGET


def test_routing_of_any_skew():
    site = make_site(E=7, K=2)
    session = session_of(model_of(site, Sort()))
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        x, ids, w = tokens(site, 1 + 41 * seed, seed=seed)
        skewed = torch.rand(7, generator=rng) ** (seed + 1)
        ids = torch.multinomial(skewed, ids.numel(), replacement=True, generator=rng).reshape(ids.shape) - seed % 3
        assert eps_off(run(session, x, ids, w), exact(site, x, ids, w)) <= BUDGET, seed

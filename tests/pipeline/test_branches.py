"""A branch of a block's Python on its routing: a dispatch may ask whether an expert has tokens, and nothing else that
no case of verification tried both ways."""

import pytest
import torch

import moeopt
from tests.toy_moe import Block, E, H, build

UNTRIED = {
    "all to the first": (lambda ids, w: (ids[:, 0] == 0).all(), "(all) that is False in every case"),
    "one of the first half": (lambda ids, w: ids.max() < E // 2, "(lt) that is False in every case"),
    "none to the last": (lambda ids, w: ~(ids == E - 1).any(), "(bitwise_not) that is False in every case"),
    "sure": (lambda ids, w: (w[:, 0] > 0.9).all(), "weights with a limit (all)"),
    "faint": (lambda ids, w: w.sum() < 0.3, "weights with a limit (lt)"),
}


class Doubling(Block):
    """Twice the result where a condition on the routing of all tokens holds."""

    def __init__(self, name):
        super().__init__()
        self.condition, self.renormalise = UNTRIED[name][0], False

    def forward(self, x):
        ids, w = self.route(x)
        y = self.loop(x, ids, w)
        return 2 * y if self.condition(ids, w) else y


@pytest.mark.parametrize("name", UNTRIED)
def test_a_branch_that_no_case_took_is_declined(name):
    block = moeopt.explain(build(Doubling, name=name), torch.randn(12, H)).blocks[0]
    assert block.status == "declined"
    asked = "comparison of routing" if "limit" in UNTRIED[name][1] else "value computed from the routing"
    assert block.reason.startswith(f"its forward branches on a {asked} {UNTRIED[name][1]}")
    assert "write both ways as tensors (torch.where)" in block.reason and "test_branches.py" in block.source


class Asking(Block):
    """Asks whether each expert has tokens, in one of the ways in which a dispatch does."""

    def __init__(self, asks, top_k=2):
        super().__init__()
        self.asks, self.top_k = asks, top_k

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        assert (ids < E).all() and (ids.max() < E), "an id that names no expert"
        numbers = range(E) if self.asks is not None else torch.bincount(ids.flatten(), minlength=E).nonzero()
        for e in numbers:
            if self.asks is None and e == E or self.asks is not None and not self.asks(ids, e):
                continue
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


ASKS = {
    "any": lambda ids, e: (ids == e).any(),
    "not all": lambda ids, e: not (ids != e).all(),
    "not the not": lambda ids, e: ~(~(ids == e).any()),
    "count": lambda ids, e: (ids == e).sum() > 0,
    "no count": lambda ids, e: (torch.bincount(ids.flatten(), minlength=E)[e] == 0).logical_not(),
    "mask": lambda ids, e: torch.nn.functional.one_hot(ids, E).bool()[..., e].any(),
    "a number that none has": None,
}


@pytest.mark.parametrize("top_k", [2, E])
@pytest.mark.parametrize("name", ASKS)
def test_what_a_dispatch_asks_is_no_such_branch(name, top_k):
    block = moeopt.explain(build(Asking, asks=ASKS[name], top_k=top_k), torch.randn(12, H), verify="fast").blocks[0]
    assert block.status == "rewritten", block.reason


class Loops(Asking):
    """Weights are halved until none is too large: on most calls not once."""

    def loop(self, x, ids, w):
        while (w > 1.5).any():
            w = w * 0.5
        return super().loop(x, ids, w)


def test_a_loop_that_runs_on_large_weights_only_is_declined_and_ends():
    block = moeopt.explain(build(Loops, asks=ASKS["any"]), torch.randn(12, H), verify="fast").blocks[0]
    assert block.status == "declined" and "its forward branches on a comparison of routing weights" in block.reason

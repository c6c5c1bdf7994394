"""A mask beside the ids says which of them serve: which mask is taken, and what is said where none fits."""

import pytest
import torch

import moeopt
from tests.toy_moe import Block, E, H


class Keeps(Block):
    """All experts of a token in the order of their scores; ``keep`` says how many of them serve."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x):
        shown, ids = self.gate(x).softmax(-1).sort(-1, descending=True)
        keep, y = self.keep(shown), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & keep)
            y.index_add_(0, token, expert(x[token]) * shown[token, slot, None])
        return y


def first_always(shown):
    keep = shown.cumsum(-1) < 0.8
    keep[:, 0] = True  # shows on a token only whose first score alone is 0.8
    return keep


@pytest.mark.parametrize(
    "keep", [first_always, lambda shown: (shown.cumsum(-1) < 0.8) | (torch.arange(E) == 0)], ids=["written", "or"]
)
def test_the_mask_that_the_dispatch_reads_is_taken_and_none_that_it_is_made_of(keep):
    torch.manual_seed(1)
    source, x = Keeps(keep).eval(), torch.randn(12, H) / 4
    opt = moeopt.optimize(source, x, verify="fast")
    assert opt.report.rewritten, opt.report
    for scale in (1, 20, 200):
        torch.testing.assert_close(opt(x * scale), source(x * scale), rtol=1e-4, atol=1e-5)


class Asks(Block):
    """The best two, whose shares of all scores the dispatch compares; half of the tokens are halved before."""

    def forward(self, x):
        x = torch.where(x[:, :1] > 0, x, x / 2)
        shown, ids = torch.topk(self.gate(x).softmax(-1), 2, -1)
        weights, y = shown / shown.sum(-1, keepdim=True), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & (shown > 0.01))
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def test_a_mask_of_one_entry_for_each_token_is_none_of_slots():
    torch.manual_seed(1)
    source, x = Asks().eval(), torch.randn(12, H)
    (block,) = moeopt.explain(source, x).blocks
    assert block.status == "declined" and "depends on more than the tensors that hold the routing" in block.reason

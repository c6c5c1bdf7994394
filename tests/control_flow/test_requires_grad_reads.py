"""Freezing and thawing the weights changes the numbers of few blocks: those that ask are left alone."""

import pytest
import torch

import moeopt
from tests.toy_moe import Block, H, X, build, close, seeded


class Asks(Block):
    def route(self, x):
        ids, w = super().route(x)
        return ids, w * 2 if self.gate.weight.requires_grad else w


class AsksAny(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if any(p.requires_grad for p in self.experts.parameters()) else y + 1


class AsksInVain(Block):
    def forward(self, x):
        with torch.set_grad_enabled(any(p.requires_grad for p in self.parameters())):
            return super().forward(x)


@pytest.mark.parametrize("make", [Asks, AsksAny])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_that_asks_is_left_alone_and_the_flags_stay(make, frozen):
    model = build(make).requires_grad_(not frozen)
    opt = moeopt.optimize(model, X, verify="fast")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined"
    assert "asks whether its Parameters require a gradient (requires_grad)" in block.reason
    assert "ask self.training, or an attribute" in block.reason
    assert all(p.requires_grad is not frozen for p in (*model.parameters(), *opt.model.parameters()))
    opt.model.requires_grad_(frozen)
    with torch.no_grad():
        assert torch.equal(opt(seeded(2, 7, H)), build(make).requires_grad_(frozen)(seeded(2, 7, H)))


def test_one_that_asks_in_vain_is_rewritten():
    opt = moeopt.optimize(build(AsksInVain), X, verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    with torch.no_grad():
        close(opt(seeded(2, 7, H)), build(AsksInVain)(seeded(2, 7, H)))

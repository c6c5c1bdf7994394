"""A router with equal rows is named as the cause where a block is declined, and where it is none it is no obstacle."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.rewrite.equal_rows import equal_rows_reason
from tests.toy_moe import Block, E, H, X, build


class First(Block):
    """The expert of the largest score, the first of equal ones."""

    def route(self, x):
        p = self.gate(x).softmax(-1)
        ids = p.argmax(-1, keepdim=True)
        return ids, p.gather(1, ids)


class Masked(First):
    """The same, expert by expert and in place."""

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids[:, 0] == e
            if mine.any():
                y[mine] = expert(x[mine]) * w[mine]
        return y


def zeros(weight):
    weight.zero_()


def copies(weight):
    weight.copy_(weight[:1].clone().expand_as(weight))


def pairs(weight):
    weight[1], weight[3] = weight[0].clone(), weight[2].clone()


@pytest.mark.parametrize(
    ("make", "change", "different"),
    [(First, zeros, 1), (First, copies, 1), (First, pairs, 2), (Masked, zeros, 1), (Masked, copies, 1)],
)
def test_equal_rows_are_told(make, change, different):
    model = build(make)
    with torch.no_grad():
        change(model.gate.weight)
    (block,) = [b for b in moeopt.optimize(model, X, verify="fast").report.blocks if b.kind == "moe"]
    assert block.status == "declined"
    assert block.reason.startswith(f"gate.weight has {different} different rows for {E} experts")
    assert "load the trained weights, or give each expert rows of its own, and optimise again" in block.reason


def test_where_every_expert_is_chosen_all_the_same_they_are_no_obstacle():
    model = build()
    with torch.no_grad():
        pairs(model.gate.weight)
    assert [b.status for b in moeopt.optimize(model, X, verify="fast").report.blocks] == ["rewritten"]


class Columns(nn.Module):
    def __init__(self, rows, experts=6):
        super().__init__()
        self.router = nn.Parameter(rows)
        self.w = nn.Parameter(torch.randn(experts, H, H, generator=torch.Generator().manual_seed(0)))


def test_what_may_be_a_router():
    assert equal_rows_reason(build()) == ""
    assert equal_rows_reason(Columns(torch.zeros(H, 6))).startswith("router has 1 different columns for 6 experts")
    assert equal_rows_reason(Columns(torch.zeros(H, 5))) == "", "there are no five experts"
    assert equal_rows_reason(Columns(torch.full((6, H), torch.nan))) == "", "that is another obstacle"
    assert equal_rows_reason(Columns(torch.zeros(6, 0))) == ""

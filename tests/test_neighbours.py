"""What the report says of a block does not depend on the blocks that stand before or behind it in a model."""

import os
import random
import re

import pytest
import torch
from torch import nn

import moeopt
from tests.zoo import CASES

PAIRS = 400 if os.environ.get("MOEOPT_NIGHTLY") == "1" else 2


def in_a_row(case):
    """Whether the case takes one tensor and returns one of the same shape, so that others can stand around it."""
    args, kwargs = case.inputs()
    if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return False
    model = case.build()
    if model.training or any(p.is_meta for p in model.parameters()):
        return False
    out = model(args[0])
    return isinstance(out, torch.Tensor) and out.shape == args[0].shape and out.dtype == args[0].dtype


def pairs():
    """Names of two cases that fit each other."""
    fitting: dict[tuple, list[str]] = {}
    for name, case in sorted(CASES.items()):
        if name != "act_512_experts" and in_a_row(case):  # that one alone costs a minute, and shows nothing else
            x = case.inputs()[0][0]
            fitting.setdefault((x.dim(), x.shape[-1], x.dtype), []).append(name)
    every = [(a, b) for names in fitting.values() for a in names for b in names if a != b]
    return random.Random(0).sample(every, min(PAIRS, len(every)))


def said(model, x, prefix=""):
    """What a report says of the blocks inside the child called ``prefix``, with names as of that child alone."""
    root = type(model).__name__
    found = []
    for block in moeopt.explain(model, x).blocks:
        name = "" if block.name == root else block.name
        if not prefix or re.match(rf"{prefix}(\.|$)", name):
            reason = re.sub(r"[0-9.]+e-[0-9]+", "#", block.reason)  # figures of a verification that failed
            found.append((name.removeprefix(prefix).removeprefix("."), block.kind, block.status, block.experts, reason))
    return found


@pytest.mark.parametrize(("first", "second"), pairs())
def test_a_block_is_told_alike_before_and_behind_another(first, second):
    x = CASES[first].inputs()[0][0]
    both = nn.Sequential(CASES[first].build(), CASES[second].build())
    with torch.no_grad():
        rows = x, CASES[first].build()(x)  # which experts the rows reach is theirs, and no neighbour's
    for child, name in enumerate((first, second)):
        assert said(both, x, str(child)) == said(CASES[name].build(), rows[child]), name
    assert {b.name.split(".")[0] for b in moeopt.explain(both, x).blocks} <= {"0", "1"}, "no block of the whole model"


class SplitExperts(nn.Module):
    """Top-1 experts whose layers lie in three lists; the norm keeps them from being a pair of matmuls."""

    def __init__(self, hidden=16, experts=4):
        super().__init__()
        self.scores = nn.Linear(hidden, experts)
        self.first = nn.ModuleList(nn.Linear(hidden, 24) for _ in range(experts))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(experts))
        self.second = nn.ModuleList(nn.Linear(24, hidden) for _ in range(experts))

    def forward(self, x):
        weight, chosen = self.scores(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e in range(len(self.first)):
            rows = torch.where(chosen == e)[0]
            if len(rows):
                y[rows] = weight[rows, None] * self.second[e](torch.sin(self.norms[e](self.first[e](x[rows]))))
        return y


class SoftSlots(nn.Module):
    """Slots that mix all tokens: rows behind it are so alike that they choose one expert."""

    def __init__(self, hidden=16, experts=4):
        super().__init__()
        self.slots = nn.Linear(hidden, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 24), nn.GELU(), nn.Linear(24, hidden)) for _ in range(experts)
        )

    def forward(self, x):
        scores = self.slots(x)
        mixed = scores.softmax(0).T @ x
        results = torch.cat([expert(mixed[e : e + 1]) for e, expert in enumerate(self.experts)])
        return scores.softmax(1) @ results


@pytest.mark.parametrize("kinds", [(SplitExperts, SoftSlots), (SoftSlots, SplitExperts)])
def test_two_declined_blocks_are_two_entries_in_either_order(kinds):
    torch.manual_seed(0)
    report = moeopt.explain(nn.Sequential(*(kind() for kind in kinds)).eval(), torch.randn(12, 16))
    assert [(b.name, b.experts) for b in report.blocks] == [("0", 4), ("1", 4)]
    reasons = dict(zip(kinds, (b.reason for b in report.blocks), strict=True))
    assert "a function of a row that no grouped kernel has" in reasons[SplitExperts]
    assert "slots that mix tokens" in reasons[SoftSlots]


def test_random_numbers_of_one_block_are_no_reason_of_another():
    first, second = CASES["declined_gumbel"], CASES["strange_half_of_the_experts_unreachable"]
    report = moeopt.explain(nn.Sequential(first.build(), second.build()), first.inputs()[0][0])
    assert [b.name for b in report.blocks] == ["0", "1"]
    assert (
        "random" in report.blocks[0].reason and "no probe token reached the expert weights" in report.blocks[1].reason
    )

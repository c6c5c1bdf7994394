"""Experts that no row of the example reached: in the report, and no other modules that stay idle."""

import pytest
import torch
from torch import nn

import moeopt
from tests.recognise.tiny import H, ffn, seeded


class Threshold(nn.Module):
    """Experts take the rows that they are nearly certain of."""

    def __init__(self, limit):
        super().__init__()
        self.gate, self.limit = nn.Linear(H, 4), limit
        self.experts = nn.ModuleList(ffn() for _ in range(4))

    def forward(self, x):
        scores, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (scores[:, e] > self.limit).nonzero().flatten()
            if rows.numel():
                out[rows] += scores[rows, e, None] * expert(x[rows])
        return x + out


class Layers(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner = nn.Linear(H, H), inner

    def forward(self, x):
        return self.inner(self.first(x))


class Training(nn.Module):
    """Auxiliary heads for training lie idle beside a softmax that weighs other things, or as many."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.out = ffn(), nn.Linear(H, classes)
        self.heads = nn.ModuleList(ffn() for _ in range(4))

    def forward(self, x):
        y = self.body(x)
        if self.training:
            y = y + sum(head(x) for head in self.heads)
        return self.out(y).softmax(-1) if self.out.out_features != 4 else self.out(y)


def test_a_block_whose_experts_all_stay_idle_is_declined_and_not_left_out():
    for model, name in ((Threshold(2.0), "Threshold"), (Layers(Threshold(2.0)), "inner")):
        report = moeopt.explain(
            seeded(lambda model=model: model), torch.randn(6, H, generator=torch.Generator().manual_seed(0))
        )
        (block,) = report.blocks
        assert (block.name, block.experts, block.status) == (name, 4, "declined")
        assert block.reason.startswith("none of its 4 experts ran on the example inputs: no row was sent to one")
        assert block.reason.endswith(
            "give example inputs whose rows reach experts, real ones rather than random numbers"
        )


def test_heads_that_training_alone_uses_are_no_experts():
    x = torch.randn(6, H, generator=torch.Generator().manual_seed(0))
    for classes in (3, 4):
        report = moeopt.explain(seeded(lambda classes=classes: Training(classes)).eval(), x)
        assert [block for block in report.blocks if block.kind == "moe"] == []


class Shared(nn.Module):
    """Experts that mix their rows, which declines them, and one of their shape for all tokens."""

    def __init__(self, experts):
        super().__init__()
        self.gate, self.shared = nn.Linear(8, experts), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(experts)
        )

    def forward(self, x):
        ids = self.gate(x).argmax(-1)
        y = self.shared(x)
        for number, expert in enumerate(self.experts):
            (row,) = torch.where(ids == number)
            if len(row):
                y[row] += expert(x[row]).softmax(0)
        return y


@pytest.mark.parametrize("tokens", [3, 64])
def test_experts_of_a_declined_block_are_counted_without_the_shared_one_and_with_those_that_did_not_run(tokens):
    torch.manual_seed(0)
    (block,) = [b for b in moeopt.explain(Shared(6).eval(), torch.randn(tokens, 8)).blocks if b.kind == "moe"]
    assert (block.status, block.experts) == ("declined", 6)

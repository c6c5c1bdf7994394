"""Lists of experts that ran in one forward: how many mixtures they are, and of how many experts."""

import pytest
import torch
from torch import nn

import moeopt

D = 16


def normed(width):
    return nn.Sequential(nn.Linear(D, width), nn.LayerNorm(width), nn.Linear(width, D))


class Lists(nn.Module):
    """Two lists of unequal experts with a norm inside, which are listed and declined."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.ModuleList(map(normed, (8, 12, 16)))
        self.wide = nn.ModuleList(map(normed, (20, 24, 28, 32)))
        self.first, self.second, self.both = nn.Linear(D, 3), nn.Linear(D, 4), nn.Linear(D, 7)

    def routed(self, rows, gate, experts):
        weights, ids = gate(rows).softmax(-1).topk(1)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(experts):
            token, slot = torch.where(ids == number)
            total = total.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return total

    def weighed(self, rows, gate, experts):
        weights = gate(rows).softmax(-1)
        return sum(weights[:, i, None] * expert(rows) for i, expert in enumerate(experts))


class TwoGates(Lists):
    def forward(self, x):
        return self.routed(x, self.first, self.narrow) + self.routed(x, self.second, self.wide)


class OneGate(Lists):
    def forward(self, x):
        return self.routed(x, self.both, [*self.narrow, *self.wide])


class OneAfterTheOther(Lists):
    def forward(self, x):
        x = x + self.routed(x, self.first, self.narrow)
        return x + self.routed(x, self.second, self.wide)


class AllWeighed(Lists):
    def forward(self, x):
        return self.weighed(x, self.first, self.narrow) + self.weighed(x, self.second, self.wide)


class Layers(nn.Module):
    """First layers in one list, norms in another, second layers in a third."""

    def __init__(self):
        super().__init__()
        widths = (8, 12, 16)
        self.gate = nn.Linear(D, 3)
        self.up, self.down = (nn.ModuleList(map(make, widths)) for make in (lambda w: nn.Linear(D, w), self.narrowing))
        self.norm = nn.ModuleList(map(nn.LayerNorm, widths))

    @staticmethod
    def narrowing(width):
        return nn.Linear(width, D)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(1)
        total = torch.zeros_like(x)
        for number, (up, norm, down) in enumerate(zip(self.up, self.norm, self.down, strict=True)):
            token, slot = torch.where(ids == number)
            total = total.index_add(0, token, down(norm(up(x[token]))) * weights[token, slot, None])
        return total


@pytest.mark.parametrize(
    ("make", "experts"),
    [(TwoGates, [3, 4]), (OneGate, [7]), (OneAfterTheOther, [3, 4]), (AllWeighed, [3, 4]), (Layers, [3])],
)
def test_mixtures_and_their_experts(make, experts):
    torch.manual_seed(0)
    blocks = [b for b in moeopt.explain(make().eval(), (torch.randn(40, D),), verify="fast").blocks if b.kind == "moe"]
    assert [b.experts for b in blocks] == experts
    for block in blocks:
        assert "different shapes" in block.reason and "zeros would change what its norm computes" in block.reason


class RoutesRows(nn.Module):
    """What stands before in a model: its choice picks rows, and all later rows depend on it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, 3)

    def forward(self, x):
        return x + self.gate(x).softmax(-1).topk(1).values


@pytest.mark.parametrize(
    ("make", "experts"),
    [(TwoGates, [3, 4]), (OneGate, [7]), (OneAfterTheOther, [3, 4]), (AllWeighed, [3, 4]), (Layers, [3])],
)
def test_a_choice_before_the_module_makes_no_mixture_of_its_lists(make, experts):
    torch.manual_seed(0)
    model = nn.Sequential(RoutesRows(), make()).eval()
    blocks = [b for b in moeopt.explain(model, (torch.randn(40, D),), verify="fast").blocks if b.kind == "moe"]
    assert [b.experts for b in blocks] == experts

"""Recommenders: experts that score with a single number, features in a dict, and a tower behind each task's gate."""

import torch
from torch import nn

from tests.zoo.case import case, flat, made_by

D, HID, N = 16, 24, 4


def scorer():
    return nn.Sequential(nn.Linear(D, HID), nn.ReLU(), nn.Linear(HID, 1))


class Scores(nn.Module):
    """The number of each expert that a softmax over the best two of them weighs; no axis is left for it."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.ModuleList(scorer() for _ in range(N)), nn.Linear(D, N)

    def forward(self, x):
        logits = self.gate(x)
        best, ids = logits.topk(2)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(-1)
        return (torch.cat([f(x) for f in self.experts], -1) * weights).sum(-1).sigmoid()


@case(flat(D), experts=N)
def scores_without_an_axis():
    return Scores()


class FactorisedScores(Scores):
    """The deep part of a factorisation machine."""

    def __init__(self, fields=4):
        super().__init__()
        self.factors, self.linear = nn.Embedding(50, D // fields), nn.Embedding(50, 1)

    def forward(self, ids):
        v = self.factors(ids)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1) / 2
        x = v.flatten(1)
        deep = sum(p * f(x).squeeze(-1) for p, f in zip(self.gate(x).softmax(-1).unbind(-1), self.experts, strict=True))
        return torch.sigmoid(self.linear(ids).sum((1, 2)) + pairs + deep)


@case(made_by(lambda s, g: ((torch.randint(50, (s[0] * s[1], 4), generator=g),), {})), experts=N)
def scores_of_a_factorisation_machine():
    return FactorisedScores()


class Features(nn.Module):
    """One gate, features and results in dicts."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleDict({"user": nn.Embedding(20, 6), "item": nn.Embedding(30, 6)})
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, HID), nn.ReLU(), nn.Linear(HID, 8)) for _ in range(3))
        self.gate = nn.Linear(D, 3)
        self.heads = nn.ModuleDict({"click": nn.Linear(8, 1), "buy": nn.Linear(8, 1)})

    def forward(self, features):
        x = torch.cat([*(table(features[name]) for name, table in self.tables.items()), features["numbers"]], -1)
        weights = self.gate(x).softmax(-1)
        mixed = sum(weights[:, i, None] * f(x) for i, f in enumerate(self.experts))
        return {name: head(mixed).sigmoid().squeeze(-1) for name, head in self.heads.items()}


def named_features(shape, generator):
    count = shape[0] * shape[1]
    ids = {name: torch.randint(size, (count,), generator=generator) for name, size in (("user", 20), ("item", 30))}
    return (), {"features": {**ids, "numbers": torch.randn(count, 4, generator=generator)}}


@case(made_by(named_features), experts=3)
def features_in_a_dict():
    return Features()


class Towers(nn.Module):
    """MMoE: experts with batch norms, a softmax over them and a tower of two layers for each of three tasks."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, HID), nn.BatchNorm1d(HID), nn.ReLU(), nn.Linear(HID, 12)) for _ in range(N)
        )
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(D, N), nn.Softmax(1)) for _ in range(3))
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 1)) for _ in range(3))

    def forward(self, x):
        outs = torch.cat([f(x).unsqueeze(1) for f in self.experts], 1)
        mixed = [torch.bmm(gate(x).unsqueeze(1), outs).squeeze(1) for gate in self.gates]
        return [torch.sigmoid(tower(part)) for tower, part in zip(self.towers, mixed, strict=True)]


@case(
    flat(D),
    experts=N,
    expect="declined",
    reason="^its experts' outputs are summed several times, each time by another gate",
)
def towers_are_no_experts():
    return Towers()


class EachTask(nn.Module):
    """Every task routes through the same experts, one after the other."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D)) for _ in range(N))
        self.gates = nn.ModuleDict({task: nn.Linear(D, N) for task in ("edges", "depth")})

    def forward(self, x):
        found = {}
        for task, gate in self.gates.items():
            weights, ids = gate(x).softmax(-1).topk(2)
            y = torch.zeros_like(x)
            for i, f in enumerate(self.experts):
                row, slot = torch.where(ids == i)
                y.index_add_(0, row, f(x[row]) * weights[row, slot, None])
            found[task] = y
        return found


@case(flat(D), experts=N, expect="declined", reason="^its experts run several times in one forward .*chunk or task")
def experts_run_for_each_task():
    return EachTask()

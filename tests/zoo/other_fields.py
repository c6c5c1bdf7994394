"""Mixtures of other fields than language: adaptive numbers of experts, stacks of deep networks of agents that learn
several tasks, mixtures inside attention, vectors and trees."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, seq

D, HID, N = 16, 24, 4


def ffn():
    return nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D))


def stack(*sizes):
    return nn.Parameter(torch.randn(*sizes) * 0.3)


class OwnThresholds(nn.Module):
    """Each expert takes the tokens nearer to it than a threshold of its own; a token that none takes goes to the
    nearest. The mean of those that a token has (DynMoE)."""

    def __init__(self, count=6):
        super().__init__()
        self.centres, self.limits = stack(D, count), nn.Parameter(torch.randn(count) * 0.1)
        self.experts = nn.ModuleList(ffn() for _ in range(count))

    def forward(self, x):
        rows = x.reshape(-1, D)
        near = (F.normalize(rows, dim=-1) @ F.normalize(self.centres, dim=0)).sigmoid()
        taken = F.relu(near - self.limits.sigmoid()) > 0
        nearest = F.one_hot(near.argmax(-1), len(self.experts)).bool()
        taken = torch.where((taken.sum(-1) == 0)[:, None], nearest, taken)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            places = taken[:, number].nonzero(as_tuple=True)[0]
            if places.numel():
                total[places] += expert(rows[places])
        return (total / taken.sum(-1, keepdim=True)).view(x.shape)


@case(seq(D), experts=6)
def thresholds_of_each_expert():
    return OwnThresholds()

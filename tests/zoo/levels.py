"""Routing in levels whose groups are no modules: a router chooses a group of experts, the group's router an expert."""

import torch
from torch import nn

from tests.zoo.case import case, flat

H = 16


def net():
    return nn.Sequential(nn.Linear(H, 24), nn.GELU(), nn.Linear(24, H))


class Levels(nn.Module):
    def __init__(self, groups=2, each=3):
        super().__init__()
        self.top = nn.Linear(H, groups)
        self.low = nn.ModuleList([nn.Linear(H, each) for _ in range(groups)])


class SharesOfShares(Levels):
    """Every expert on every token, each with a product of two shares for a weight."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleList([net() for _ in range(3)]) for _ in range(2)])

    def forward(self, x):
        outer, y = self.top(x).softmax(-1), 0
        for g, (low, bank) in enumerate(zip(self.low, self.experts, strict=True)):
            inner = low(x).softmax(-1)
            for e, expert in enumerate(bank):
                y = y + outer[:, g : g + 1] * inner[:, e : e + 1] * expert(x)
        return y


class GroupThenExpert(Levels):
    """All experts in one list; each group's router sees the rows of its group alone."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([net() for _ in range(6)])

    def forward(self, x):
        share, group = self.top(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for g, low in enumerate(self.low):
            (mine,) = (group == g).nonzero(as_tuple=True)
            if not len(mine):
                continue
            h = x[mine]
            w, ids = low(h).softmax(-1).topk(2)
            for e in range(3):
                r, k = torch.where(ids == e)
                if r.numel():
                    out = self.experts[3 * g + e](h[r]) * w[r, k, None] * share[mine[r], None]
                    y.index_add_(0, mine[r], out)
        return y


class SumsOfGroups(Levels):
    """Lists in a list; each group sums its experts, and the sums are weighted."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleList([net() for _ in range(3)]) for _ in range(2)])

    def forward(self, x):
        share, groups = self.top(x).softmax(-1).topk(1)
        y = torch.zeros_like(x)
        for g, (low, bank) in enumerate(zip(self.low, self.experts, strict=True)):
            token, slot = torch.where(groups == g)
            if token.numel() == 0:
                continue
            h = x[token]
            w, ids = low(h).softmax(-1).topk(1)
            part = torch.zeros_like(h)
            for e, expert in enumerate(bank):
                chosen = ids[:, 0] == e
                if chosen.any():
                    part[chosen] = w[chosen] * expert(h[chosen])
            y.index_add_(0, token, part * share[token, slot].unsqueeze(-1))
        return y


@case(flat(H), experts=6)
def levels_shares_of_shares():
    return SharesOfShares()


@case(flat(H), experts=6, expect="declined", reason="stands in no one tensor.*backend='onnxruntime' takes it")
def levels_group_then_expert():
    return GroupThenExpert()


@case(flat(H), experts=6, expect="declined", reason="stands in no one tensor.*backend='onnxruntime' takes it")
def levels_sums_of_groups():
    return SumsOfGroups()

"""Routing in levels whose groups are no modules, and experts that share a matrix or a product."""

import torch
from torch import nn

from tests.zoo.case import case, flat, made_by

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


class SharedLast(nn.Module):
    """Experts of a first matrix each, before one that all of them share; the routing weight is on their input."""

    def __init__(self):
        super().__init__()
        self.router, self.out = nn.Linear(H, 4, bias=False), nn.Linear(24, H)
        self.first = nn.ModuleList([nn.Linear(H, 24) for _ in range(4)])

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, first in enumerate(self.first):
            mine = ids == e
            if mine.any():
                y[mine] = self.out(torch.relu(first(x[mine] * w[mine, None])))
        return y


class CutInParts(nn.Module):
    """One wide first layer whose result is cut into the experts' parts."""

    def __init__(self):
        super().__init__()
        self.router, self.wide = nn.Linear(H, 4), nn.Linear(H, 4 * 24)
        self.last = nn.ModuleList([nn.Linear(24, H) for _ in range(4)])

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        parts = torch.relu(self.wide(x)).chunk(4, -1)
        return sum(shares[:, e, None] * last(part) for e, (last, part) in enumerate(zip(self.last, parts, strict=True)))


class WeighedNeurons(nn.Module):
    """An einsum of three operands, which adds up the experts inside its last product."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, H, 24) / 4), nn.Parameter(torch.randn(4, 24, H) / 5)

    def forward(self, x):
        neurons = torch.relu(torch.einsum("th,ehi->tei", x, self.up))
        return torch.einsum("te,tei,eih->th", self.router(x).softmax(-1), neurons, self.down)


class DomainInAColumn(nn.Module):
    """The first column names the domain of a row; every expert sees every row, and one result is taken."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([net() for _ in range(3)])

    def forward(self, x):
        domain, y = x[:, 0].long(), torch.zeros_like(x[:, 1:])
        for e, expert in enumerate(self.experts):
            y = torch.where((domain == e)[:, None], expert(x[:, 1:]), y)
        return y


def with_domains(shape, generator):
    count = shape[0] * shape[1]
    domain = torch.randint(0, 3, (count, 1), generator=generator).float()
    return (torch.cat([domain, torch.randn(count, H, generator=generator)], 1),), {}


@case(flat(H), experts=4)
def sharing_the_last_matrix():
    return SharedLast()


@case(
    flat(H),
    experts=4,
    expect="declined",
    reason=r"one product of all of them \(wide.weight: 96 = 4 x 24",
)
def sharing_the_first_product():
    return CutInParts()


@case(flat(H), experts=4, expect="declined", reason="inside one product that adds up all experts, down: 96 = 4 x 24")
def sharing_the_last_product():
    return WeighedNeurons()


@case(made_by(with_domains), experts=3)
def domain_in_a_column():
    return DomainInAColumn()

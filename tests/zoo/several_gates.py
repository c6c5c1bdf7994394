"""Recommenders: several gates over the same experts, whose sums are several."""

import torch
from torch import nn

from tests.zoo.case import case, flat, made_by

D, N, TASKS = 16, 5, 2
SUMMED = "^its experts' outputs are summed several times, each time by another gate"


def layers(*sizes, norm):
    made = []
    for inner, outer in zip(sizes, sizes[1:], strict=False):
        made += [nn.Linear(inner, outer), *([nn.BatchNorm1d(outer)] if norm else []), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*made)


class GateOfEachTask(nn.Module):
    """Experts that end with an activation, a list of gates, a list of towers (MMoE)."""

    def __init__(self, norm):
        super().__init__()
        self.experts = nn.ModuleList(layers(D, 32, 24, norm=norm) for _ in range(N))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(D, N), nn.Softmax(dim=1)) for _ in range(TASKS))
        self.towers = nn.ModuleList(nn.Sequential(layers(24, 12, norm=norm), nn.Linear(12, 1)) for _ in range(TASKS))

    def forward(self, x):
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [torch.bmm(gate(x).unsqueeze(1), experts).squeeze(1) for gate in self.gates]
        return [torch.sigmoid(tower(rows).squeeze(1)) for tower, rows in zip(self.towers, mixed, strict=True)]


@case(flat(D), experts=N, expect="declined", reason=SUMMED)
def gates_of_tasks():
    return GateOfEachTask(norm=False)


@case(flat(D), experts=N, expect="declined", reason=SUMMED)
def gates_of_tasks_over_experts_with_norms():
    return GateOfEachTask(norm=True)


class Level(nn.Module):
    """A gate for each task over experts of its own and shared ones, and one over all of them."""

    def __init__(self):
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(layers(D, 24, D, norm=False) for _ in range(2)) for _ in range(TASKS))
        self.shared = nn.ModuleList(layers(D, 24, D, norm=False) for _ in range(2))
        self.gates = nn.ModuleList([*(nn.Linear(D, 4) for _ in range(TASKS)), nn.Linear(D, 6)])

    def forward(self, *rows):
        shared = [expert(rows[-1]) for expert in self.shared]
        own = [[expert(x) for expert in experts] for experts, x in zip(self.own, rows, strict=False)]
        sets = [*([*mine, *shared] for mine in own), [y for mine in own for y in mine] + shared]
        weights = [gate(x).softmax(-1).unsqueeze(1) for gate, x in zip(self.gates, rows, strict=True)]
        return [torch.bmm(w, torch.stack(y, 1)).squeeze(1) for w, y in zip(weights, sets, strict=True)]


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([Level(), Level()])

    def forward(self, x):
        rows = [x] * (TASKS + 1)
        for level in self.levels:
            rows = level(*rows)
        return rows[:-1]


@case(flat(D), experts=6, expect="declined", moe=2, reason=SUMMED)
def gates_of_tasks_in_levels():
    return Levels()


class OneAfterAnother(nn.Module):
    """Each expert's result without what it shares with those before it: no sum, however they are stacked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)) for _ in range(3))
        self.weights = nn.Linear(D, 3)

    def forward(self, x):
        results = torch.stack([expert(x) for expert in self.experts], 1)
        basis = []
        for number in range(3):
            rest = results[:, number]
            for other in basis:
                rest = rest - (rest * other).sum(-1, keepdim=True) * other
            basis.append(rest / (rest.norm(dim=-1, keepdim=True) + 1e-6))
        return torch.einsum("te,ted->td", self.weights(x), torch.stack(basis, 1))


@case(flat(D), experts=3, expect="declined", reason="their sum is not linear in the experts' outputs")
def experts_made_orthogonal():
    return OneAfterAnother()


class Star(nn.Module):
    """A network for each domain, whose matrices are shared ones times its own (STAR); all run, and a domain picks."""

    def __init__(self, domains=3):
        super().__init__()
        self.shared = nn.ParameterList(nn.Parameter(torch.randn(*size) * 0.3) for size in ((D, 24), (24, D)))
        self.own = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.rand(*size) + 0.5) for size in ((D, 24), (24, D)))
            for _ in range(domains)
        )

    def forward(self, x, domain):
        total = torch.zeros_like(x)
        for number, own in enumerate(self.own):
            hidden = torch.relu(x @ (self.shared[0] * own[0]))
            total = torch.where((domain == number)[:, None], hidden @ (self.shared[1] * own[1]), total)
        return total


def rows_of_domains(shape, generator):
    count = shape[0] * shape[1] + 3
    return (torch.randn(count, D, generator=generator), torch.arange(count) % 3), {}


@case(
    made_by(rows_of_domains), experts=3, expect="declined", reason="weights are computed at each call .*shared weights"
)
def matrices_of_domains_times_shared_ones():
    return Star()

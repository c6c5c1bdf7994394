"""Numbers beside the weights, experts of one list that serve all, adapters of weighed rows, experts that a comparison
keeps: mixtures in the styles of Grove, of research baselines, of X-LoRA and of time series and recommender models."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, made_by, seq

D, N, HID = 16, 4, 24


def ffn(width=HID):
    return nn.Sequential(nn.Linear(D, width), nn.GELU(), nn.Linear(width, D))


class Routed(nn.Module):
    def __init__(self, experts=N):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N, bias=False), nn.ModuleList(ffn() for _ in range(experts))

    def route(self, rows):
        return self.gate(rows).softmax(-1).topk(2)


class Adjugates(Routed):
    """A small expert for each pair of experts, by the sum of the pair's weights times 0.3, added onto their results."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList(ffn(8) for _ in range(N // 2))

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            y[row] += 1.5 * weights[row, slot, None] * expert(rows[row])
        shares = torch.zeros(len(rows), N // 2).scatter_add(1, ids // 2, weights)
        for number, pair in enumerate(self.pairs):
            row = shares[:, number].nonzero().squeeze(1)
            y[row] += 0.3 * shares[row, number, None] * pair(rows[row])
        return y.view_as(x)


@case(seq(D), experts=(N, N // 2), moe=2)
def scaled_weights_and_adjugates():
    return Adjugates()


class SharedInTheList(Routed):
    """The first expert of the list serves every token, and no router names it."""

    def __init__(self):
        super().__init__(N + 1)

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            if number == 0:
                y += expert(rows)
                continue
            row, slot = torch.where(ids == number - 1)
            y[row] += weights[row, slot, None] * expert(rows[row])
        return y.view_as(x)


@case(seq(D), experts=N)
def shared_expert_first_in_the_list():
    return SharedInTheList()


class WeighedRows(nn.Module):
    """Adapters behind a shared matrix: each reads the rows times its weight, and its result is scaled by a number."""

    def __init__(self):
        super().__init__()
        self.base, self.gate = nn.Linear(D, D), nn.Linear(D, N)
        self.down = nn.ModuleDict({f"task{n}": nn.Linear(D, 3, bias=False) for n in range(N)})
        self.up = nn.ModuleDict({f"task{n}": nn.Linear(3, D, bias=False) for n in range(N)})

    def forward(self, x):
        weights, y = self.gate(x).softmax(-1), self.base(x)
        for number, name in enumerate(self.down):
            y = y + self.up[name](self.down[name](x * weights[..., number, None])) * 2.0
        return y


@case(seq(D), experts=N)
def adapters_of_weighed_rows():
    return WeighedRows()


class SumByABag(Routed):
    """The results of all experts in one table, from which a bag adds up those that each token chose."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.route(rows)
        places = ids * len(rows) + torch.arange(len(rows))[:, None]
        every = torch.cat([expert(rows) for expert in self.experts])
        return F.embedding_bag(places, every, per_sample_weights=weights, mode="sum").view_as(x)


@case(seq(D), experts=N)
def sum_by_a_bag():
    return SumByABag()


class ByNoise(Routed):
    """Two experts for each sample by its noise level, one float; the samples that chose an expert are picked whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, D)

    def forward(self, x, noise):
        weights, ids = self.route(self.embed(noise[:, None]))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sample, slot = torch.where(ids == number)
            if len(sample):
                y[sample] += expert(x[sample]) * weights[sample, slot, None, None]
        return y


@case(made_by(lambda s, g: ((torch.randn(*s, D, generator=g), torch.rand(s[0], generator=g) * 4 - 2), {})), experts=N)
def experts_of_a_noise_level():
    return ByNoise()


SIZES = (8, 12, 16)


class BySize(nn.Module):
    """A projection for each size of patch; all are computed, and a comparison keeps one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(SIZES), D, D) / 4)
        self.register_buffer("mask", (torch.arange(D) < torch.tensor(SIZES)[:, None]).float()[:, None])

    def forward(self, x, size):
        y = 0
        for number, each in enumerate(SIZES):
            y = y + torch.eq(size, each)[..., None] * (x @ (self.weight[number] * self.mask[number]).t())
        return y


def with_choice(values):
    """(B, S, D) beside one of ``values`` for each token."""

    def make(s, g):
        return (torch.randn(*s, D, generator=g), torch.tensor(values)[torch.randint(len(values), s, generator=g)]), {}

    return made_by(make)


@case(with_choice(SIZES), experts=len(SIZES), expect="declined", reason=r"one matrix each \(weight\).*a comparison")
def projections_of_a_size():
    return BySize()


class Towers(nn.Module):
    """A network with a batch norm for each domain; all run, and the domain's is taken."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(D, HID), nn.BatchNorm1d(HID), nn.ReLU(), nn.Linear(HID, D)) for _ in range(3)
        )

    def forward(self, x, domain):
        rows, which = x.reshape(-1, D), domain.reshape(-1, 1)
        y = torch.zeros_like(rows)
        for number, tower in enumerate(self.towers):
            y = torch.where(which == number, tower(rows), y)
        return y.view_as(x)


@case(with_choice((0, 1, 2)), experts=3, expect="declined", reason="native_batch_norm.*would not pay here")
def towers_of_domains_with_batch_norms():
    return Towers()


class Graph(nn.Module):
    """Two layers over neighbours for each expert, which the block calls one by one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, N)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"first": nn.Linear(D, HID), "last": nn.Linear(HID, D)}) for _ in range(N)
        )

    def forward(self, x):
        weights, near = self.gate(x).softmax(-1), (x @ x.transpose(-1, -2) > 0).float()
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + weights[..., number, None] * (near @ expert["last"](F.relu(near @ expert["first"](x))))
        return y


@case(seq(D), experts=N, expect="declined", reason="adds up rows of several tokens")
def graph_experts_by_layers():
    return Graph()


class Adapter(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, layer.in_features) / 4)
        self.up = nn.Parameter(torch.randn(layer.out_features, 3) / 4)

    def forward(self, y, rows):
        return y + rows @ self.down.t() @ self.up.t() * 2.0


class AdaptedRows(nn.Module):
    """One gated network; its first products are computed for all rows, and each expert adapts the rows that it is sent
    (MixLoRA)."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.gate, self.up, self.down = nn.Linear(D, HID), nn.Linear(D, HID), nn.Linear(HID, D)
        adapted = {"gate": self.gate, "up": self.up, "down": self.down}
        self.adapters = nn.ModuleDict({f"{n}_{k}": Adapter(v) for n in range(N) for k, v in adapted.items()})

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        y, gate, up = torch.zeros_like(rows), self.gate(rows), self.up(rows)
        for number in range(N):
            row, slot = torch.where(ids == number)
            gated = F.silu(self.adapters[f"{number}_gate"](gate[row], rows[row]))
            hidden = gated * self.adapters[f"{number}_up"](up[row], rows[row])
            given = self.adapters[f"{number}_down"](self.down(hidden), hidden)
            y.index_add_(0, row, given * weights[row, slot, None])
        return y.view_as(x)


@case(seq(D), experts=N, expect="either")
def adapters_on_picked_rows():
    return AdaptedRows()


class Visual(nn.Module):
    """A network for places inside an image, and one for all others: a flag that neighbours decide (CogVLM)."""

    def __init__(self):
        super().__init__()
        self.text, self.image = ffn(), ffn()

    def forward(self, x, kinds):
        visual = torch.zeros_like(kinds, dtype=torch.bool)
        visual[:, :-1] = (kinds[:, :-1] == 1) & (kinds[:, 1:] == 1)
        y = torch.empty_like(x)
        y[visual], y[~visual] = self.image(x[visual]), self.text(x[~visual])
        return y


@case(with_choice((0, 1)), experts=2)
def experts_of_a_flag():
    return Visual()

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


class CapacityAndMore(nn.Module):
    """A rounded share of the tokens and four more places for each expert: in a call of few tokens all have a place."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(ffn() for _ in range(N))

    def forward(self, x):
        rows = x.reshape(-1, D)
        capacity = int(len(rows) * 1.25 / N) + 4
        weight, number = self.gate(rows).softmax(-1).max(-1)
        codes = F.one_hot(number, N)
        place = (codes.cumsum(0) * codes).sum(-1) - 1
        kept = place < capacity
        slots = torch.zeros(N, capacity, D).index_put((number[kept], place[kept]), rows[kept])
        outs = torch.stack([expert(slot) for expert, slot in zip(self.experts, slots, strict=True)])
        total = torch.zeros_like(rows)
        total[kept] = outs[number[kept], place[kept]]
        return (total * weight[:, None]).view(x.shape)


@case(seq(D), experts=N, expect="declined", reason="no simple function.*a capacity need not be rounded")
def capacity_of_a_rounded_share_and_more():
    return CapacityAndMore()


class SurestFirst(CapacityAndMore):
    """Each expert has four places, for the tokens that the router is surest of (V-MoE's batch priority)."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        weight, number = self.gate(rows).softmax(-1).max(-1)
        first = weight.argsort(descending=True)
        codes = F.one_hot(number[first], N)
        kept = ((codes.cumsum(0) - 1) * codes).sum(-1) < 4
        total = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            mine = first[kept & (number[first] == index)]
            total[mine] = expert(rows[mine]) * weight[mine, None]
        return total.view(x.shape)


@case(seq(D), experts=N, expect="declined", reason="leave out tokens.*keeps the first or the best so many")
def capacity_for_the_surest_tokens():
    return SurestFirst()


class Encoders(nn.Module):
    """Stacked networks of three layers on all observations, weighed by the task of each (CARE)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = stack(N, D, HID), stack(N, HID, HID), stack(N, HID, D)
        self.tasks, self.context = nn.Embedding(5, 8), nn.Linear(8, N)

    def forward(self, rows, task):
        weights = self.context(self.tasks(task)).softmax(-1)
        results = (rows.matmul(self.first).relu() @ self.second).relu() @ self.third
        return (results * weights.t()[..., None]).sum(0)


def observations(i):
    size, generator = [11, 1, 5, 32, 2][i % 5], torch.Generator().manual_seed(1000 + i)
    return (torch.randn(size, D, generator=generator), torch.randint(5, (size,), generator=generator)), {}


@case(observations, experts=N, expect="declined", reason="more than two layers and are computed together.*by first")
def deep_encoders_of_tasks():
    return Encoders()


class WholeLayers(nn.Module):
    """Each sequence is sent to one transformer layer."""

    def __init__(self):
        super().__init__()
        layers = (nn.TransformerEncoderLayer(D, 2, HID, dropout=0.0, batch_first=True) for _ in range(3))
        self.gate, self.layers = nn.Linear(D, 3), nn.ModuleList(layers)

    def forward(self, x):
        weight, number = self.gate(x.mean(1)).softmax(-1).max(-1)
        total = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            mine = number == index
            if mine.any():
                total[mine] = layer(x[mine]) * weight[mine, None, None]
        return total


@case(seq(D), experts=3, expect="declined", reason="stands attention.*or mix their tokens by it")
def whole_transformer_layers_as_experts():
    return WholeLayers()


class OfItsOwnSize(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.net, self.factor = ffn(), factor

    def forward(self, rows):
        return self.net(rows) * self.factor


class NumbersOfTheirOwn(CapacityAndMore):
    """Each expert multiplies its result by a number of its own."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(OfItsOwnSize(1 / (number + 1)) for number in range(N))

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(ids == index)
            total.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return total.view(x.shape)


@case(seq(D), experts=N, expect="declined", reason=r"multiplied by a number of each expert's own \(mul\)")
def numbers_of_each_experts_own():
    return NumbersOfTheirOwn()

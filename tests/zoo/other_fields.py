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


class Bilinear(nn.Module):
    """Every expert is one bilinear form of the row with itself, and a gate weighs all."""

    def __init__(self):
        super().__init__()
        self.gate, self.forms = nn.Linear(D, N), nn.ModuleList(nn.Bilinear(D, D, 8) for _ in range(N))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., e : e + 1] * form(x, x) for e, form in enumerate(self.forms))


@case(seq(D), experts=N, expect="either", moe=1)
def bilinear_forms_of_a_gate():
    return Bilinear()


class OfSoftmaxes(nn.Module):
    """Several contexts by one product, one matrix of words for all, and a prior over their softmaxes."""

    def __init__(self):
        super().__init__()
        self.prior, self.contexts, self.words = nn.Linear(D, N), nn.Linear(D, N * D), nn.Linear(D, 30)

    def forward(self, x):
        parts = self.words(self.contexts(x).tanh().view(*x.shape[:-1], N, D)).softmax(-1)
        return (parts * self.prior(x).softmax(-1)[..., None]).sum(-2).log()


@case(seq(D), experts=N, expect="declined", reason=r"4 parts of one product \(contexts.weight\).*\(words.weight\)")
def mixture_of_softmaxes():
    return OfSoftmaxes()


class OfHeads(nn.Module):
    """A router chooses among the heads of an attention, all of which are computed."""

    def __init__(self):
        super().__init__()
        self.qkv, self.router, self.out = nn.Linear(D, 3 * D), nn.Linear(D, N), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, N, D // N).permute(2, 0, 3, 1, 4)
        scores = self.router(x).softmax(-1)
        kept = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0) * scores
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out((mixed * kept[..., None]).flatten(2))


@case(seq(D), experts=N, expect="declined", reason="4 heads of an attention, which all run")
def mixture_of_heads():
    return OfHeads()


class TreeOfNeurons(nn.Module):
    """Each neuron's product with the token tells which one is next (a fast feed-forward)."""

    def __init__(self, depth=3):
        super().__init__()
        self.depth, self.first, self.last = depth, stack(2**depth - 1, D), stack(2**depth - 1, D)

    def forward(self, x):
        rows, total = x.reshape(-1, D), 0
        node = torch.zeros(len(rows), dtype=torch.long)
        for _ in range(self.depth):
            score = (rows * self.first[node]).sum(-1)
            total = total + F.gelu(score)[:, None] * self.last[node]
            node = 2 * node + 1 + (score > 0).long()
        return total.view(x.shape)


@case(seq(D), experts=7, expect="declined", reason="single neurons of a tree: each is one row of first")
def tree_of_neurons():
    return TreeOfNeurons()


class ChosenVectors(nn.Module):
    """One network of all experts, whose inputs and outputs each expert scales by vectors of its own (BatchEnsemble)."""

    def __init__(self):
        super().__init__()
        self.net, self.gate, self.scales = ffn(), nn.Linear(D, N), nn.Embedding(N, D)
        self.signs = stack(N, D)

    def forward(self, x):
        weight, number = self.gate(x).softmax(-1).max(-1)
        return self.net(x * self.signs[number]) * self.scales(number) * weight[..., None]


@case(seq(D), experts=N, expect="declined", reason="are vectors, the rows of signs, scales.weight, which a gate mixes")
def vectors_of_the_chosen_expert():
    return ChosenVectors()

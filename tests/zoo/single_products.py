"""Mixtures whose experts are one product each: projections of an attention, kernels of a convolution; and experts of
other kinds beside FFNs."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, image, made_by, seq

D, HID, N = 16, 24, 4
NO_KERNEL = "one matmul, a function of a row that no grouped kernel has"


def stack(*sizes):
    return nn.Parameter(torch.randn(*sizes) / 4)


class RoutedMatrix(nn.Module):
    """Each row times the matrices that its ids name, weighed."""

    def __init__(self, a, b):
        super().__init__()
        self.weight = stack(N, a, b)

    def forward(self, rows, weights, ids):
        y = rows.new_zeros(len(rows), self.weight.shape[-1])
        for number in range(N):
            row, slot = torch.where(ids == number)
            y = y.index_add(0, row, rows[row] @ self.weight[number] * weights[row, slot, None])
        return y


class RoutedHeads(nn.Module):
    """Attention whose values and outputs are mixtures, with a router for each head."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads, self.width = heads, width
        self.qk = nn.Linear(D, 2 * heads * width, bias=False)
        self.values = nn.ModuleList(RoutedMatrix(D, width) for _ in range(heads))
        self.outputs = nn.ModuleList(RoutedMatrix(width, D) for _ in range(heads))
        self.routers = nn.ModuleList(nn.Linear(D, N, bias=False) for _ in range(2 * heads))

    def mix(self, number, part, rows, x):
        weights, ids = self.routers[number](x.reshape(-1, D)).sigmoid().topk(2)
        return part(rows.reshape(-1, rows.shape[-1]), weights, ids).view(*x.shape[:-1], -1)

    def forward(self, x):
        q, k = self.qk(x).view(*x.shape[:-1], self.heads, -1).transpose(1, 2).chunk(2, -1)
        v = torch.stack([self.mix(h, part, x, x) for h, part in enumerate(self.values)], 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return sum(self.mix(self.heads + h, part, a[:, h], x) for h, part in enumerate(self.outputs))


@case(seq(D), experts=N, expect="declined", moe=4, reason=NO_KERNEL)
def single_routed_heads():
    return RoutedHeads()


class Projections(nn.Module):
    """Attention whose values are a mixture of matrices; ``values`` is what differs below."""

    def __init__(self):
        super().__init__()
        self.qk, self.gate, self.out = nn.Linear(D, 2 * D), nn.Linear(D, N), nn.Linear(D, D)

    def forward(self, x):
        q, k = self.qk(x)[:, None].chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(q, k, self.values(x)[:, None])[:, 0])


class ChosenProjections(Projections):
    """Every projection runs, and a top-k leaves two of them a weight."""

    def __init__(self):
        super().__init__()
        self.v = nn.ModuleList(nn.Linear(D, D) for _ in range(N))

    def values(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        gates = torch.zeros(*x.shape[:-1], N).scatter(-1, ids, weights)
        return sum(gates[..., n, None] * part(x) for n, part in enumerate(self.v))


@case(seq(D), experts=N, expect="declined", reason=NO_KERNEL)
def single_chosen_projections():
    return ChosenProjections()


class LookedUpProjections(Projections):
    """Each token multiplies by a copy of its own matrix."""

    def __init__(self):
        super().__init__()
        self.v = stack(N, D, D)

    def values(self, x):
        weights, ids = self.gate(x).softmax(-1).max(-1)
        return (x[..., None, :] @ self.v[ids])[..., 0, :] * weights[..., None]


@case(
    seq(D), experts=N, expect="declined", reason=r"one matrix each, and each token multiplies by a copy.*\(v\[ids\]\)"
)
def single_looked_up_projections():
    return LookedUpProjections()


class StackedAtEachCall(ChosenProjections):
    """The same, of matrices that the code stacks."""

    def values(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        picked = torch.stack([part.weight for part in self.v])[ids]
        return (torch.einsum("...h,...koh->...ko", x, picked) * weights[..., None]).sum(-2)


@case(seq(D), experts=N, expect="declined", reason=r"a copy of its own \(torch.stack\(v.#.weight\)\[ids\]\)")
def single_projections_stacked_at_each_call():
    return StackedAtEachCall()


class Kernels(nn.Module):
    """A kernel for each sample, picked by its mean; all samples are the groups of one convolution."""

    def __init__(self):
        super().__init__()
        self.gate, self.kernels = nn.Linear(D, N), stack(N, D, D, 3)

    def forward(self, x):
        weight, ids = self.gate(x.mean(1)).softmax(-1).max(-1)
        flat = x.transpose(1, 2).reshape(1, -1, x.shape[1])
        y = F.conv1d(flat, self.kernels[ids].flatten(0, 1), padding=1, groups=len(x)).view(len(x), D, -1)
        return (y * weight[:, None, None]).transpose(1, 2)


@case(seq(D), experts=N, expect="declined", reason="picks its experts' kernels for each sample")
def single_kernels_in_groups():
    return Kernels()


class KernelOfASample(Kernels):
    """The same, sample by sample."""

    def forward(self, x):
        ids = self.gate(x.mean(1)).argmax(-1)
        return torch.cat(
            [F.conv1d(one.t()[None], self.kernels[n], padding=1) for one, n in zip(x, ids, strict=True)]
        ).mT


@case(seq(D), experts=N, expect="declined", reason="convolutions of 3;")
def single_kernel_by_number():
    return KernelOfASample()


class ConvolutionOfASample(nn.Module):
    """A module for each sample, which Python names."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(N))

    def forward(self, x):
        ids = self.gate(x.mean((2, 3))).argmax(-1)
        return torch.stack([self.experts[int(n)](one) for one, n in zip(x, ids, strict=True)])


@case(image(D), experts=N, expect="declined", reason="convolutions of 3x3;")
def single_convolution_by_number():
    return ConvolutionOfASample()


class Kinds(nn.Module):
    """After the FFNs come experts of zeros, of the token itself and of a learned constant."""

    def __init__(self):
        super().__init__()
        self.gate, self.constant, self.share = nn.Linear(D, N + 3), nn.Parameter(torch.randn(D)), nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D)) for _ in range(N))

    def expert(self, number, rows):
        if number < N:
            return self.experts[number](rows)
        if number == N:
            return torch.zeros_like(rows)
        if number == N + 1:
            return rows
        share = self.share(rows).softmax(-1)
        return share[:, :1] * rows + share[:, 1:] * self.constant


class KindsOfAMask(Kinds):
    """Each kind adds to the sum by itself, on the rows that a mask of all tokens gives it; scores of the layer before
    are added."""

    def forward(self, x, before):
        rows = x.reshape(-1, D)
        scores = self.gate(rows) + before.reshape(-1, N + 3)
        weights, ids = scores.softmax(-1).topk(2)
        mask = torch.zeros_like(scores).scatter(1, ids, weights / weights.sum(-1, keepdim=True))
        y = 0
        for number in range(N + 3):
            row = (mask[:, number] > 0).nonzero().flatten()
            y = y + torch.zeros_like(rows).index_add(0, row, self.expert(number, rows[row]) * mask[row, number, None])
        return y.view_as(x), scores


def with_scores(size, generator):
    return (torch.randn(*size, D, generator=generator), torch.randn(*size, N + 3, generator=generator)), {}


@case(made_by(with_scores), experts=N)
def kinds_of_experts_by_mask():
    return KindsOfAMask()


class KindsSorted(Kinds):
    """All kinds in one sorted tensor, summed at once."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        order = ids.flatten().argsort(stable=True)
        parts = rows[order // 2].split(ids.flatten().bincount(minlength=N + 3).tolist())
        y = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        return torch.zeros_like(rows).index_add(0, order // 2, y * weights.flatten()[order, None]).view_as(x)


@case(
    seq(D), experts=N, expect="declined", reason=r"also chooses ids \(4, 5, 6\) whose experts are not like the other 4"
)
def kinds_of_experts_sorted():
    return KindsSorted()


class LoadLoss(nn.Module):
    """A noisy gate without its noise, and the loss of the load: how likely each expert is among the best."""

    def __init__(self):
        super().__init__()
        self.gate, self.noise = nn.Linear(D, N), nn.Linear(D, N)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D)) for _ in range(N))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("spread", torch.ones(1))

    @staticmethod
    def uneven(amounts):
        return amounts.var() / (amounts.mean() ** 2 + 1e-10)

    def forward(self, x):
        rows = x.reshape(-1, D)
        scores, width = self.gate(rows), F.softplus(self.noise(rows)) + 1e-2
        best, ids = scores.topk(3)
        weights = torch.zeros_like(scores).scatter(1, ids[:, :2], best[:, :2].softmax(-1))
        normal = torch.distributions.Normal(self.mean, self.spread)
        inside = normal.cdf((scores - best[:, 2:]) / width)
        likely = torch.where(scores > best[:, 2:], inside, normal.cdf((scores - best[:, 1:2]) / width))
        loss = self.uneven(weights.sum(0)) + self.uneven(likely.sum(0))
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row = weights[:, number].nonzero().squeeze(1)
            y[row] += expert(rows[row]) * weights[row, number, None]
        return y.view_as(x), loss


def by_keyword(size, generator):
    """The model raises on NaN, which tests put into positional arguments."""
    return (), {"x": torch.randn(*size, D, generator=generator)}


@case(made_by(by_keyword), experts=N)
def style_load_loss():
    return LoadLoss()


class Asserting(LoadLoss):
    """Its code checks its values."""

    def forward(self, x):
        assert x.isfinite().all(), "not finite"
        y, loss = super().forward(x)
        if torch.isnan(y).any():
            raise ValueError("the result holds NaN")
        return y, loss


@case(made_by(by_keyword), experts=N)
def style_assertions():
    return Asserting()


class SortedMatrices(nn.Module):
    """A product for each expert, of rows that lie sorted, so many for each."""

    def __init__(self, a, b):
        super().__init__()
        self.weight = stack(N, b, a)

    def forward(self, rows, counts):
        parts = rows.split(counts, dim=0)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, self.weight, strict=True)])


class QueriesAndOutputs(nn.Module):
    """Attention whose queries and outputs are mixtures by one choice, made between the two calls (JetMoE)."""

    def __init__(self, width=8):
        super().__init__()
        self.router, self.kv = nn.Linear(D, N, bias=False), nn.Linear(D, 2 * width, bias=False)
        self.queries, self.outputs = SortedMatrices(D, width), SortedMatrices(width, D)

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.router(rows).topk(2)
        _, order = ids.flatten().sort(0)
        counts = torch.zeros(N, dtype=torch.long).index_add(0, ids.flatten(), torch.ones_like(order)).tolist()
        queries = self.queries(rows[order // 2], counts)
        queries = torch.zeros_like(queries).index_add(0, order, queries).view(*x.shape[:2], 2, -1).transpose(1, 2)
        k, v = (t[:, None].expand_as(queries) for t in self.kv(x).chunk(2, -1))
        mixed = F.scaled_dot_product_attention(queries, k, v, is_causal=True).transpose(1, 2).reshape(2 * len(rows), -1)
        outs = self.outputs(mixed[order], counts) * weights.softmax(-1).flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, order // 2, outs).view_as(x)


@case(
    seq(D), experts=N, expect="declined", reason="stands attention or a softmax: the experts are projections around it"
)
def single_projections_around_an_attention():
    return QueriesAndOutputs()

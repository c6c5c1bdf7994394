"""Forms that well-known MoE libraries and recommenders have in common, in the fewest lines that keep the form."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, made_by, seq


def sort_by_expert(pick, count):
    """(order of the (token, slot) pairs by expert, rows of each expert)."""
    order = torch.argsort(pick.flatten(), stable=True)
    return order, torch.bincount(pick.flatten(), minlength=count).tolist()


class GatedGroupedProducts(nn.Module):
    """A helper multiplies each expert's rows and concatenates; gate and up meet after that."""

    def __init__(self, d=16, h=24, count=4, *, banks_are_flat=False):
        super().__init__()
        shape = (count * h, d) if banks_are_flat else (count, h, d)
        self.count, self.h = count, h
        self.router = nn.Linear(d, count, bias=False)
        self.v1, self.w1, self.w2 = (nn.Parameter(torch.randn(shape) * 0.3) for _ in range(3))

    def matrix(self, bank, e):
        return bank[e * self.h : (e + 1) * self.h] if bank.dim() == 2 else bank[e]

    def grouped(self, rows, bank, sizes, transposed):
        parts = []
        for e, part in enumerate(rows.split(sizes)):
            w = self.matrix(bank, e)
            parts.append(part @ (w.t() if transposed else w))
        return torch.cat(parts)

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        weights, pick = self.router(t).softmax(-1).topk(2, -1)
        order, sizes = sort_by_expert(pick, self.count)
        rows = t[order // 2]
        hidden = F.silu(self.grouped(rows, self.w1, sizes, True)) * self.grouped(rows, self.v1, sizes, True)
        out = self.grouped(hidden, self.w2, sizes, False) * weights.flatten()[order, None]
        return torch.zeros_like(t).index_add_(0, order // 2, out).view_as(x)


@case(seq(16), experts=4)
def gated_grouped_products():
    return GatedGroupedProducts()


@case(seq(16), experts=4)
def gated_grouped_products_of_flat_banks():
    return GatedGroupedProducts(banks_are_flat=True)


class GatedByHand(GatedGroupedProducts):
    """Each product slices its rows anew, and the activation is applied to the whole of one side only after both."""

    def grouped(self, rows, bank, sizes, transposed):
        parts, start = [], 0
        for e, size in enumerate(sizes):
            w = self.matrix(bank, e)
            parts.append(torch.matmul(rows[start : start + size], w.mT if transposed else w))
            start += size
        return torch.cat(parts)


@case(flat(16), experts=4)
def gated_grouped_products_sliced_by_hand():
    return GatedByHand(banks_are_flat=True)


class Product(nn.Module):
    """A linear layer for a bank of experts, of which there is one here."""

    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, o, i) * 0.3)
        self.bias = nn.Parameter(torch.randn(1, o) * 0.3)

    def forward(self, x, sizes):
        rows = x.split(sizes)
        return torch.cat([F.linear(r, w, b) for r, w, b in zip(rows, self.weight, self.bias, strict=True)])


class BankOfOne(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h_to_4h, self.back = Product(d, h), Product(h, d)

    def forward(self, x, sizes):
        return self.back(F.gelu(self.h_to_4h(x, sizes)), sizes)


class BanksOfOne(nn.Module):
    """A list of experts, each of which is a bank of one."""

    def __init__(self, d=16, h=24, count=4):
        super().__init__()
        self.gate = nn.Linear(d, count)
        self.experts = nn.ModuleList(BankOfOne(d, h) for _ in range(count))

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        value, pick = self.gate(t).topk(2, -1)
        order, sizes = sort_by_expert(pick, len(self.experts))
        rows = t[order // 2].split(sizes)
        out = torch.cat([e(part, [len(part)]) for e, part in zip(self.experts, rows, strict=True)])
        out = torch.zeros_like(out).index_copy(0, order, out).view(-1, 2, x.shape[-1])
        return (value.softmax(-1).unsqueeze(-1) * out).sum(1).view_as(x)


@case(seq(16), experts=4)
def banks_of_one_in_a_list():
    return BanksOfOne()


class WeightsPerSlot(nn.Module):
    """K vectors of weights, K vectors of places in a buffer that is as long as it has to be."""

    def __init__(self, d=16, h=24, count=4):
        super().__init__()
        self.count = count
        self.wg = nn.Linear(d, count, bias=False)
        self.fc1 = nn.Parameter(torch.randn(count, h, d) * 0.3)
        self.fc2 = nn.Parameter(torch.randn(count, h, d) * 0.3)

    def choices(self, scores):
        """For each slot the experts (T,) and the weights (T,)."""
        pick = scores.topk(2, -1).indices
        ids = [column.view(-1) for column in pick.chunk(2, 1)]
        gates = [(scores * F.one_hot(i, self.count)).sum(1) for i in ids]
        total = torch.stack(gates).sum(0).clamp(min=1e-9)
        return ids, [g / total for g in gates]

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        ids, gates = self.choices(self.wg(t).softmax(-1))
        before, places = 0, []
        for i in ids:
            mask = F.one_hot(i, self.count)
            places.append(((mask.cumsum(0) - 1 + before) * mask).sum(1))
            before = before + mask.sum(0, keepdim=True)
        room = int(before.max())
        buffer = t.new_zeros(self.count * room, t.shape[1])
        spots = [i * room + p for i, p in zip(ids, places, strict=True)]
        for s in spots:
            buffer[s] = t
        out = F.relu(buffer.view(self.count, room, -1) @ self.fc1.mT) @ self.fc2
        out = out.flatten(0, 1)
        return sum(g[:, None] * out[s] for g, s in zip(gates, spots, strict=True)).view_as(x)


@case(seq(16), experts=4)
def weights_per_slot():
    return WeightsPerSlot()


class WinnerThenRunnerUp(WeightsPerSlot):
    """An argmax, and another without the winner: neither ids nor weights are ever one tensor."""

    def choices(self, scores):
        first = scores.argmax(-1)
        second = scores.masked_fill(F.one_hot(first, self.count).bool(), -1).argmax(-1)
        one = scores.gather(1, first[:, None]).squeeze(1)
        two = scores.gather(1, second[:, None]).squeeze(1)
        return [first, second], [one / (one + two), two / (one + two)]


@case(seq(16), experts=5)
def winner_then_runner_up():
    return WinnerThenRunnerUp(count=5)


IDS = 20


def rows_with_ids(shape, generator):
    """A float table: one column of ids, four of numbers."""
    count = shape[0] * shape[1]
    ids = torch.randint(IDS, (count, 1), generator=generator).float()
    return (), {"x": torch.cat([ids, torch.randn(count, 4, generator=generator)], 1)}  # not all of it takes a NaN


class IdsInFloats(nn.Module):
    """Multi-gate mixture over features, of which some are embedded ids of the same float table."""

    def __init__(self, d=12, h=24, o=16, count=3):
        super().__init__()
        self.table = nn.Embedding(IDS, d - 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, o)) for _ in range(count))
        self.gate, self.tower = nn.Linear(d, count, bias=False), nn.Linear(o, 1)

    def forward(self, x):
        x = torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1)
        out = torch.stack([e(x) for e in self.experts], 1)
        return self.tower((self.gate(x).softmax(-1).unsqueeze(1) @ out).squeeze(1)).sigmoid()


@case(made_by(rows_with_ids), experts=3)
def ids_in_float_columns():
    return IdsInFloats()


class IdsInFloatsRouted(IdsInFloats):
    """The same with two experts a row."""

    def forward(self, x):
        x = torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1)
        weights, pick = self.gate(x).softmax(-1).topk(2, -1)
        y = x.new_zeros(len(x), self.tower.in_features)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(pick == e)
            y.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return self.tower(y)


@case(made_by(rows_with_ids), experts=4)
def ids_in_float_columns_routed():
    return IdsInFloatsRouted(count=4)


class Gated(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.w1, self.w3, self.w2 = (
            nn.Linear(d, h, bias=False),
            nn.Linear(d, h, bias=False),
            nn.Linear(h, d, bias=False),
        )

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Packed(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate_up, self.down = nn.Linear(d, 2 * h), nn.Linear(h, d)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def plain(d, h):
    return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))


class UnequalExperts(nn.Module):
    """Experts of a loop over those that are hit, each with as many neurons as it likes."""

    def __init__(self, make, sizes, d=16, k=2):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(d, len(sizes), bias=False)
        self.experts = nn.ModuleList(make(d, h) for h in sizes)

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        weights, pick = self.gate(t).softmax(-1).topk(self.k, -1)
        y = torch.zeros_like(t)
        for e in pick.unique().tolist():
            row, slot = torch.where(pick == e)
            y.index_add_(0, row, self.experts[e](t[row]) * weights[row, slot, None])
        return y.view_as(x)


@case(seq(16), experts=4)
def unequal_experts():
    return UnequalExperts(plain, (24, 8, 40, 24))


@case(seq(16), experts=5)
def unequal_gated_experts():
    return UnequalExperts(Gated, (8, 16, 24, 32, 40))


@case(seq(16), experts=4)
def unequal_packed_experts():
    return UnequalExperts(Packed, (8, 24, 8, 40), k=1)


class DistancesToCenters(UnequalExperts):
    """Tokens go to the experts whose centers are nearest, in Euclidean distance."""

    def __init__(self, d=16):
        super().__init__(plain, (24, 24, 24, 24), d)
        self.centers = nn.Parameter(torch.randn(4, d))

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        weights, pick = (-torch.cdist(t, self.centers)).softmax(-1).topk(2, -1)
        y = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(pick == e)
            y.index_add_(0, row, expert(t[row]) * weights[row, slot, None])
        return y.view_as(x)


@case(seq(16), experts=4)
def distances_to_centers():
    return DistancesToCenters()


class FlagsOfGroups(UnequalExperts):
    """The best of two groups of experts, by flags that are themselves masked; tokens of zeros keep none."""

    def __init__(self, d=16):
        super().__init__(plain, (24, 24, 24, 24), d)

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        scores = self.gate(t).softmax(-1)
        group = scores.view(-1, 2, 2).amax(-1).argmax(-1)
        flags = F.one_hot(group, 2).bool().repeat_interleave(2, 1)
        flags = flags.masked_fill((t == 0).all(-1, keepdim=True), False)
        scores = scores.masked_fill(~flags, 0.0)
        y = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            row = flags[:, e].nonzero().squeeze(1)
            y[row] += expert(t[row]) * scores[row, e, None]
        return y.view_as(x)


@case(seq(16), experts=4)
def flags_of_groups():
    return FlagsOfGroups()


class NarrowExperts(UnequalExperts):
    """bfloat16 experts in a float32 model: their rows are cast on the way in and out."""

    def __init__(self, d=16):
        super().__init__(plain, (24, 24, 24, 24), d)
        self.experts.to(torch.bfloat16)

    def forward(self, x):
        t = x.reshape(-1, x.shape[-1])
        weights, pick = self.gate(t).softmax(-1).topk(2, -1)
        y = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(pick == e)
            y.index_add_(0, row, expert(t[row].bfloat16()).float() * weights[row, slot, None])
        return y.view_as(x)


@case(seq(16), experts=4)
def bfloat16_experts_in_float32():
    return NarrowExperts()

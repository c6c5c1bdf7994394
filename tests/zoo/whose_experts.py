"""Experts that are chosen for a domain, a task or a language, that read a condition, or of which there are several
kinds and lists."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, made_by, seq

D, HID, N = 16, 24, 4


def ffn(hidden=HID, out=D):
    return nn.Sequential(nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, out))


def in_turn(count, among, generator):
    """``count`` of the numbers ``among``, each in turn, shuffled."""
    return torch.tensor(among)[torch.arange(count) % len(among)][torch.randperm(count, generator=generator)]


class NamedByDomain(nn.Module):
    """Each row says which domain it is of; the experts are entries of a dict under the domains' numbers."""

    def __init__(self, domains=(0, 2, 5)):
        super().__init__()
        self.experts = nn.ModuleDict({str(domain): ffn() for domain in domains})

    def forward(self, x, domain):
        y = torch.zeros_like(x)
        for number in domain.unique().tolist():
            rows = domain == number
            y[rows] = self.experts[str(number)](x[rows])
        return y


def rows_of_domains(*domains):
    def make(shape, generator):
        count = shape[0] * shape[1]
        return (torch.randn(count, D, generator=generator), in_turn(count, domains, generator)), {}

    return made_by(make)


@case(rows_of_domains(0, 2, 5), experts=3)
def named_by_domain():
    return NamedByDomain()


@case(rows_of_domains(3, 17, 40, 41), experts=4)
def named_by_large_numbers():
    return NamedByDomain((3, 17, 40, 41))


class SharedTimesOwn(nn.Module):
    """STAR: a domain's matrix is the shared one times its own, entry by entry, and so the biases add up."""

    def __init__(self, count=8):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, HID) * 0.3), nn.Parameter(torch.randn(HID))
        self.own = nn.Parameter(1 + 0.3 * torch.randn(count, D, HID))
        self.own_bias, self.out = nn.Parameter(torch.randn(count, HID)), nn.Parameter(torch.randn(HID, D) * 0.3)

    def forward(self, x, domain):
        y = torch.zeros_like(x)
        for number, (weight, bias) in enumerate(zip(self.own, self.own_bias, strict=True)):
            rows = domain == number
            y[rows] = F.relu(x[rows] @ (self.weight * weight) + self.bias + bias) @ self.out
        return y


@case(rows_of_domains(*range(8)), experts=8, expect="declined", reason="a vector added.*would not pay.*'onnxruntime'")
def domain_matrices_times_a_shared_one():
    return SharedTimesOwn()


class Routed(nn.Module):
    def __init__(self, make, count=N):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, count), nn.ModuleList(make() for _ in range(count))

    def mix(self, rows, weights, ids):
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            total = total.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return total

    def forward(self, x):
        rows = x.reshape(-1, D)
        return self.mix(rows, *self.gate(rows).softmax(-1).topk(2)).view_as(x)


class ByTask(Routed):
    """One task for each sequence, and two experts for each task."""

    def __init__(self):
        super().__init__(ffn)
        self.tasks = nn.Embedding(5, N)

    def forward(self, x, task):
        choice = self.tasks(task).softmax(-1).topk(2)
        weights, ids = (part[:, None].expand(-1, x.shape[1], -1).reshape(-1, 2) for part in choice)
        return self.mix(x.reshape(-1, D), weights, ids).view_as(x)


def sequences_with(numbers):
    """(B, S, D) beside (B,) numbers of each sequence; five sequences more than elsewhere, so that all are among them"""

    def make(shape, generator):
        count = shape[0] + 5
        return (torch.randn(count, shape[1], D, generator=generator), in_turn(count, numbers, generator)), {}

    return made_by(make)


@case(sequences_with(range(5)), experts=N)
def task_of_each_sequence():
    return ByTask()


class ByLanguage(Routed):
    """Whole sequences go to the expert of their language."""

    def forward(self, x, language):
        y = torch.empty_like(x)
        for number, expert in enumerate(self.experts):
            mine = language == number
            if mine.any():
                y[mine] = expert(x[mine])
        return y


@case(sequences_with(range(N)), experts=N)
def language_of_each_sequence():
    return ByLanguage(ffn)


class Conditioned(nn.Module):
    """A network whose hidden neurons a condition scales."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(D, HID), nn.Linear(HID, D), nn.Linear(8, HID)

    def forward(self, x, condition):
        return self.down(F.gelu(self.up(x)) * self.scale(condition))


class WithCondition(Routed):
    def forward(self, x, condition):
        rows = x.reshape(-1, D)
        beside = condition[:, None].expand(-1, x.shape[1], -1).reshape(-1, 8)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out = self.run(expert, rows, beside, token)
            total.index_add_(0, token, out * weights[token, slot, None])
        return total.view_as(x)

    def run(self, expert, rows, beside, token):
        return expert(rows[token], beside[token])


class WithJoinedCondition(WithCondition):
    def run(self, expert, rows, beside, token):
        both = torch.cat([rows, beside], -1)[token]
        return expert(both[:, :D], both[:, D:])


def sequences_with_condition(shape, generator):
    x, condition = torch.randn(*shape, D, generator=generator), torch.randn(shape[0], 8, generator=generator)
    return (x, condition), {}


@case(made_by(sequences_with_condition), experts=N, expect="declined", reason="would not pay.*'onnxruntime' takes it")
def condition_beside_the_row():
    return WithCondition(Conditioned)


@case(made_by(sequences_with_condition), experts=8)
def condition_joined_to_the_row():
    return WithJoinedCondition(Conditioned, 8)


class Constant(nn.Module):
    """Mixes the row with a learned vector, by two numbers of its own router."""

    def __init__(self):
        super().__init__()
        self.vector, self.mix = nn.Parameter(torch.randn(D)), nn.Linear(D, 2)

    def forward(self, x):
        row, vector = self.mix(x).softmax(-1).split(1, -1)
        return row * x + vector * self.vector


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@case(seq(D), experts=N, moe=None)
def kinds_of_experts_that_cost_nothing():
    """MoE++: four networks, and experts that copy, drop, or replace their row."""
    makers = iter([ffn] * N + [Constant, nn.Identity, Zero])
    return Routed(lambda: next(makers)(), 7)


class LowRankPairs(nn.Module):
    """Routed pairs of narrow matrices, scaled down, onto the result of the layer that they adapt."""

    def __init__(self, count=N):
        super().__init__()
        self.layer, self.gate = nn.Linear(D, D), nn.Linear(D, count)
        self.a, self.b = nn.Parameter(torch.randn(count, D, 3)), nn.Parameter(torch.randn(count, 3, D))

    def forward(self, x):
        rows = x.reshape(-1, D)
        scores, ids = self.gate(rows).topk(2)
        weights, y = scores.softmax(-1), self.layer(rows)
        for number, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            token, slot = torch.where(ids == number)
            y = y.index_add(0, token, rows[token] @ a @ b * weights[token, slot, None] * 0.25)
        return y.view_as(x)


@case(seq(D), experts=N)
def low_rank_pairs_onto_a_layer():
    return LowRankPairs()


class Balanced(nn.Module):
    """BASE: the nearest of eight centroids, whose sigmoid mixes the expert's output with the row."""

    def __init__(self, count=8):
        super().__init__()
        self.centroids, self.experts = nn.Parameter(torch.randn(count, D)), nn.ModuleList(ffn() for _ in range(count))

    def forward(self, x):
        rows = x.reshape(-1, D)
        ids = (rows @ self.centroids.t()).argmax(1)
        order, parts = ids.argsort(), []
        for number, part in enumerate(rows[order].split(torch.bincount(ids, minlength=len(self.experts)).tolist())):
            if part.size(0) > 0:
                alpha = torch.sigmoid(part.mv(self.centroids[number])).unsqueeze(1)
                part = alpha * self.experts[number](part) + (1 - alpha) * part
            parts.append(part)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return torch.cat(parts)[back].view_as(x)


@case(seq(D), experts=8, expect="declined", reason="with mv, sigmoid.*would not pay.*'onnxruntime' takes it")
def balanced_by_centroids():
    return Balanced()


class TwoLists(nn.Module):
    """A list of narrow and a list of wide experts, each with a gate of its own and a norm inside."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = (nn.ModuleList(map(self.normed, widths)) for widths in ((8, 12, 16), (20, 24, 28, 32)))
        self.gates = nn.ModuleList([nn.Linear(D, 3), nn.Linear(D, 4)])

    @staticmethod
    def normed(width):
        return nn.Sequential(nn.Linear(D, width), nn.LayerNorm(width), nn.Linear(width, D))

    def forward(self, x):
        rows = x.reshape(-1, D)
        total = torch.zeros_like(rows)
        for gate, experts in zip(self.gates, (self.narrow, self.wide), strict=True):
            weights, ids = gate(rows).softmax(-1).topk(1)
            for number, expert in enumerate(experts):
                token, slot = torch.where(ids == number)
                total = total.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return total.view_as(x)


@case(seq(D), experts=(3, 4), expect="declined", moe=2, reason="different shapes.*zeros would change what its norm")
def two_lists_of_unequal_experts():
    return TwoLists()


class Progressive(nn.Module):
    """Two tasks, each with experts of its own beside shared ones, and a gate for each over both (PLE)."""

    def __init__(self):
        super().__init__()
        self.shared = nn.ModuleList(ffn(out=8) for _ in range(2))
        self.own = nn.ModuleList(nn.ModuleList(ffn(out=8) for _ in range(2)) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(D, 4) for _ in range(2))

    def forward(self, x):
        shared = [expert(x) for expert in self.shared]
        results = []
        for gate, own in zip(self.gates, self.own, strict=True):
            outs = torch.stack([*(expert(x) for expert in own), *shared], 1)
            results.append((gate(x).softmax(-1).unsqueeze(1) @ outs).squeeze(1))
        return results


@case(flat(D), experts=6, expect="declined", reason="^its experts' outputs are summed several times.*own, or leave")
def two_gates_over_shared_experts():
    return Progressive()

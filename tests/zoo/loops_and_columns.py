"""Experts that loop over places or multiply columns, ensembles, experts that their own first product chooses, and two
mixtures of one module: rewritten, or declined for what they are."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq

D, HID, N = 16, 32, 4


def stack(*sizes):
    return nn.Parameter(torch.randn(*sizes) / 4)


class Scan(nn.Module):
    """A selective state space, place by place."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.decay = nn.Linear(D, 2 * D), nn.Linear(D, D), stack(D)

    def forward(self, x):
        value, step = self.into(x).chunk(2, -1)
        state, every = torch.zeros_like(x[:, 0]), []
        for place in range(x.shape[1]):
            state = torch.exp(-F.softplus(step[:, place]) * self.decay.abs()) * state + value[:, place]
            every.append(state)
        return self.out(torch.stack(every, 1))


class ByHand(Scan):
    """A recurrent network in a loop."""

    def forward(self, x):
        state, every = torch.zeros_like(x[:, 0]), []
        for place in range(x.shape[1]):
            state = torch.tanh(self.into(x[:, place])[:, :D] + self.out(state))
            every.append(state)
        return torch.stack(every, 1)


class EachPlace(Scan):
    """A loop over places that no place's result is read in: a function of a row."""

    def forward(self, x):
        return torch.stack([self.out(torch.tanh(self.into(x[:, place])[:, :D])) for place in range(x.shape[1])], 1)


class Weighed(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(make() for _ in range(N))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))


class ChosenForASequence(Weighed):
    def forward(self, x):
        ids, out = self.gate(x.mean(1)).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = torch.where(ids == e)[0]
            out[mine] = expert(x[mine])
        return out


RECURRENT = "a Python loop over the places of a sequence"


@case(seq(D), experts=N, expect="declined", reason=RECURRENT)
def recurrent_scans():
    return Weighed(Scan)


@case(seq(D), experts=N, expect="declined", reason=RECURRENT)
def recurrent_by_hand():
    return Weighed(ByHand)


@case(seq(D), experts=N, expect="declined", reason=RECURRENT)
def recurrent_chosen_for_a_sequence():
    return ChosenForASequence(Scan)


@case(seq(D), experts=N, expect="either")
def loop_over_places_that_no_place_reads():
    return Weighed(EachPlace)


class Columns(nn.Module):
    """Low-rank cross layers, each token a column (DCN-v2); ``layers`` of them over one stack."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.gates = layers, nn.ModuleList(nn.Linear(D, 1, bias=False) for _ in range(N))
        self.into, self.inner, self.out = stack(layers, N, 6, D), stack(layers, N, 6, 6), stack(layers, N, D, 6)
        self.bias = stack(layers, D, 1)

    def forward(self, x):
        first = last = x[..., None]
        for layer in range(self.layers):
            outs = []
            for e in range(N):
                h = torch.tanh(self.inner[layer, e] @ torch.tanh(self.into[layer, e] @ last))
                outs.append((first * (self.out[layer, e] @ h + self.bias[layer]))[..., 0])
            weights = torch.stack([gate(last[..., 0]) for gate in self.gates], 1).softmax(1)
            last = torch.stack(outs, 2) @ weights + last
        return last[..., 0]


COLUMNS = "its experts multiply columns by their matrices"


@case(flat(D), experts=N, expect="declined", reason=COLUMNS)
def columns_of_one_layer():
    return Columns(1)


@case(flat(D), experts=N, expect="declined", reason=COLUMNS)
def columns_of_two_layers():
    return Columns(2)


class Ensemble(nn.Module):
    """The mean of all experts: what THOR does in evaluation."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, HID), nn.ReLU(), nn.Linear(HID, D)) for _ in range(N))

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.experts]).mean(0)


@case(seq(D), experts=N, expect="declined", reason="every token passes all of its 4 experts, and no router weighs them")
def ensemble_of_all():
    return Ensemble()


class ChosenByNorm(nn.Module):
    """Experts that are chosen by the norm of what their first product gives (autonomy of experts)."""

    again = False

    def __init__(self):
        super().__init__()
        self.low, self.up = stack(N, D, 6), stack(N, 6, HID)
        self.gate, self.down = stack(N, D, HID), stack(N, HID, D)

    def forward(self, x):
        rows = x.reshape(-1, D)
        low = torch.einsum("td,edr->ter", rows, self.low)
        weights, ids = low.norm(dim=-1).topk(2)
        total = torch.zeros_like(rows)
        for e in range(N):
            row, slot = torch.where(ids == e)
            own = rows[row] @ self.low[e] if self.again else low[row, e]
            hidden = F.silu(own @ self.up[e]) * (rows[row] @ self.gate[e])
            total.index_add_(0, row, hidden @ self.down[e] * weights.softmax(-1)[row, slot, None])
        return total.view_as(x)


class ComputedAgain(ChosenByNorm):
    again = True


@case(
    seq(D), experts=N, expect="declined", reason="a first product of its experts .* is computed for all tokens before"
)
def chosen_by_the_norm_of_a_product():
    return ChosenByNorm()


@case(seq(D), experts=N)
def chosen_by_the_norm_and_computed_again():
    return ComputedAgain()


class CrossRows(nn.Module):
    """Two mixtures of one module that are functions of two rows, one behind the other."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(D, N) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(HID) for _ in range(2 * N))
        self.into, self.out = (nn.ParameterList(stack(N, a, b) for _ in range(2)) for a, b in ((D, HID), (HID, D)))

    def forward(self, x):
        rows = last = x.reshape(-1, D)
        for layer in range(2):
            weights, total = self.gates[layer](last).softmax(-1), 0
            for e in range(N):
                hidden = self.norms[layer * N + e](last @ self.into[layer][e]).relu()
                total = total + weights[:, e, None] * (rows * (hidden @ self.out[layer][e]))
            last = total + last
        return last.view_as(x)


@case(seq(D), experts=N, moe=2, expect="declined", reason="which would not pay here")
def two_mixtures_of_functions_in_one_module():
    return CrossRows()


class TwoGates(nn.Module):
    """Experts of each task, whose results every task's gate weighs, and its own weights once more (AdaTT)."""

    def __init__(self, tasks=2):
        super().__init__()
        self.own = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(D, HID), nn.ReLU(), nn.Linear(HID, D)) for _ in range(N // tasks))
            for _ in range(tasks)
        )
        self.gates = nn.ModuleList(nn.Linear(D, N) for _ in range(tasks))
        self.weights = nn.ParameterList(stack(1, N // tasks) for _ in range(tasks))

    def forward(self, x):
        outs, results = torch.stack([expert(x) for own in self.own for expert in own], 1), []
        for task, (gate, weights) in enumerate(zip(self.gates, self.weights, strict=True)):
            own = outs[:, 2 * task : 2 * task + 2]
            results.append((gate(x).softmax(-1)[:, None] @ outs + weights @ own)[:, 0])
        return torch.stack(results, 1)


@case(flat(D), experts=N, expect="declined", reason="summed several times, each time by another gate|another gate")
def gates_and_weights_of_their_own():
    return TwoGates()

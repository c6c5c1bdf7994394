"""Mixtures of single matrices in the styles of several fields, each with the reason that a reader of the code gives."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt

D, E = 8, 3
SUMMED = r"^it adds up its experts' matrices \(layers.#.weight\) for each sample"
ONE_EACH = "^its experts are one matrix each, and every row passes all of them, weighed by a gate"


def rand(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.3)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, E)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def gate(self, x):
        return self.router(x).softmax(-1)


class Merged(Gated):
    """The matrices of a list, merged for each sequence."""

    def forward(self, x):
        gate = self.gate(x.mean(1))
        merged = sum(gate[:, e, None, None] * layer.weight for e, layer in enumerate(self.layers))
        return x + torch.einsum("bnd,bhd->bnh", x, merged)


class MergedStack(Gated):
    def forward(self, x):
        merged = torch.einsum("be,eij->bij", self.gate(x.mean(1)), torch.stack([m.weight for m in self.layers]))
        return F.gelu(torch.bmm(x, merged.transpose(1, 2)))


class FlatKernels(Gated):
    """Kernels as rows of a table, a kernel for each sample, run as one convolution in groups."""

    def __init__(self):
        super().__init__()
        self.table = rand(E, D * D * 3)

    def forward(self, x):
        samples, length, _ = x.shape
        kernels = (torch.sigmoid(self.router(x.mean(1))) @ self.table).view(samples * D, D, 3)
        wide = x.transpose(1, 2).reshape(1, samples * D, length)
        return F.conv1d(wide, kernels, padding=1, groups=samples).view(samples, D, length)


class Hops(Gated):
    """Experts of a graph: some read the nodes, others their neighbours."""

    def forward(self, x):
        near = x.roll(1, 1) + x.roll(-1, 1)
        results = torch.stack([layer(near if e else x) for e, layer in enumerate(self.layers)], -2)
        weights, ids = self.gate(x).topk(2)
        table = torch.zeros(*x.shape[:-1], E).scatter(-1, ids, weights)
        return F.relu((table.unsqueeze(-1) * results).sum(-2))


class ChosenPatches(Gated):
    """Each expert gathers the patches that score best for it."""

    def forward(self, x):
        weights, places = self.gate(x).transpose(1, 2).topk(2, -1)
        y = x.new_zeros(x.shape[0], D)
        for e, layer in enumerate(self.layers):
            rows = x.gather(1, places[:, e, :, None].expand(-1, -1, D))
            y = y + (F.relu(layer(rows)) * weights[:, e, :, None]).sum(1)
        return y


class ValuesOfHeads(nn.Module):
    """Projections of an attention: experts for each head."""

    def __init__(self):
        super().__init__()
        self.bank, self.scores = rand(2, E, D, 4), rand(2, E, D)

    def forward(self, x):
        scores = torch.sigmoid(torch.einsum("bnd,hed->bnhe", x, self.scores))
        best, ids = scores.topk(2, -1)
        table = torch.zeros_like(scores).scatter(-1, ids, best)
        return torch.einsum("bnd,hedf,bnhe->bnhf", x, self.bank, table).flatten(-2)


class GateOfResults(Gated):
    """Low-rank experts, weighed by a gate that reads what all of them gave."""

    def __init__(self):
        super().__init__()
        self.down, self.up = (nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E)) for _ in range(2))
        self.reads = nn.Linear(E * D, E)

    def forward(self, x):
        results = [up(F.relu(down(x))) for down, up in zip(self.down, self.up, strict=True)]
        gate = self.reads(torch.cat(results, -1)).softmax(-1)
        return sum(gate[..., e, None] * r for e, r in enumerate(results))


class Joined(GateOfResults):
    """Results that one call puts together, which is no sum."""

    def join(self, parts):
        raise NotImplementedError

    def forward(self, x):
        results = [up(F.relu(down(x))) for down, up in zip(self.down, self.up, strict=True)]
        return self.join(torch.stack(results, -2) * self.gate(x).unsqueeze(-1))


class Largest(Joined):
    def join(self, parts):
        return parts.max(-2).values


class Spread(Joined):
    def join(self, parts):
        return parts.sum(-2), parts.var(-2)


class NormOfAll(Joined):
    def join(self, parts):
        return F.layer_norm(parts, (E, D)).sum(-2)


class Carried(nn.Module):
    """A state that goes from row to row, each through the expert that the row chose."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, E)
        self.layers = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(E))

    def forward(self, x):
        state, states = torch.zeros(D), []
        for row in x.reshape(-1, D):
            state = torch.tanh(self.layers[int(self.router(row).argmax())](torch.cat([row, state])))
            states.append(state)
        return torch.stack(states).view_as(x)


class HyperNetwork(nn.Module):
    """A matrix that a layer computes of hidden numbers: no mixture."""

    def __init__(self):
        super().__init__()
        self.hidden, self.makes = nn.Linear(D, 6), nn.Linear(6, D * D)

    def forward(self, x):
        return torch.bmm(x, self.makes(F.relu(self.hidden(x.mean(1)))).view(-1, D, D))


class Transfer(nn.Module):
    """A tower's result and what the tower before hands on, in an attention of two: keys are no parts of one product."""

    def __init__(self):
        super().__init__()
        self.tower, self.hands_on, self.key, self.value = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        both = torch.stack([self.tower(x), self.hands_on(x)], -2)
        return (F.softmax(self.key(both).sum(-1, keepdim=True), -2) * self.value(both)).sum(-2)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Merged, SUMMED),
        (MergedStack, SUMMED),
        (FlatKernels, "^it adds up its experts' kernels for each sample and runs one convolution with the sum"),
        (Hops, "^its experts are one matrix each, and they read 2 different tensors .as of several hops or scales"),
        (ChosenPatches, "^which rows its experts see is chosen by a comparison of the tokens with each other .topk"),
        (ValuesOfHeads, ONE_EACH),
        (GateOfResults, "they are weighed by what is computed of their own results .*compute the gate from something"),
        (
            Largest,
            "not combined by a weighted sum per token: max puts them together over the experts, so all of them run",
        ),
        (Spread, "var puts them together over the experts"),
        (NormOfAll, "native_layer_norm puts them together"),
        (Carried, "^its experts run one after another, each for one row and on what the one before gave"),
    ],
)
def test_the_reason_names_the_obstacle(make, reason) -> None:
    torch.manual_seed(0)
    (block,) = moeopt.explain(make().eval(), torch.randn(2, 6, D)).blocks
    assert (block.kind, block.status, block.experts) == ("moe", "declined", E)
    assert re.search(reason, block.reason), block.reason


@pytest.mark.parametrize("make", [HyperNetwork, Transfer])
def test_what_is_no_mixture_has_no_entry(make) -> None:
    torch.manual_seed(0)
    assert not [b for b in moeopt.explain(make().eval(), torch.randn(2, 6, D)).blocks if b.kind == "moe"]

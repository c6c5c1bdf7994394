"""Mixtures whose router speaks of whole sequences, of images, or of the layer: one row of weights for many tokens."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, image, made_by, seq

D, HID, N, STEPS = 16, 24, 4, 1000


def ffn(out=D):
    return nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, out))


def beside(make):
    """(B, S, D) beside what ``make(B, generator)`` gives for each sequence."""
    return made_by(lambda s, g: ((torch.randn(*s, D, generator=g), make(s[0], g)), {}))


class Weighed(nn.Module):
    """All experts, and one weight each for a whole sequence."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(ffn() for _ in range(N))

    def sum(self, x, weights):
        return torch.einsum("be,besd->bsd", weights, torch.stack([f(x) for f in self.experts], 1))


class ByTimestep(Weighed):
    """A diffusion model's feed-forward, weighed by the embedded timestep of each sample."""

    def __init__(self):
        super().__init__()
        self.embed, self.gate = nn.Sequential(nn.Linear(8, D), nn.SiLU()), nn.Linear(D, N)

    def forward(self, x, step):
        angles = step[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(4) / 4)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.sum(x, self.gate(self.embed(waves)).softmax(-1))


@case(beside(lambda b, g: torch.randint(STEPS, (b,), generator=g)), experts=N)
def weights_of_a_timestep():
    return ByTimestep()


class BesideAShared(Weighed):
    """Two experts for each sample by its embedded timestep, and one of their shape that serves all (Switch-DiT)."""

    def __init__(self):
        super().__init__()
        self.shared, self.gate = ffn(), nn.Linear(D, N, bias=False)

    def forward(self, x, step):
        scores = self.gate(step).softmax(-1)
        best, ids = scores.topk(2)
        weights = torch.zeros_like(scores).scatter(-1, ids, best / best.sum(-1, keepdim=True))
        y = self.shared(x)
        for number, expert in enumerate(self.experts):
            y = y + weights[:, number, None, None] * expert(x)
        return y


@case(beside(lambda b, g: torch.randn(b, D, generator=g)), experts=N)
def weights_of_a_timestep_beside_a_shared_expert():
    return BesideAShared()


class ChosenBesideAShared(BesideAShared):
    """The same with the experts that a sample chose alone; a call of few samples leaves most of them idle."""

    def forward(self, x, step):
        best, ids = self.gate(step).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sample, slot = torch.where(ids == number)
            if len(sample):
                y[sample] += best[sample, slot, None, None] * expert(x[sample])
        return y + self.shared(x)


def samples(i):
    draw, (batch, length) = torch.Generator().manual_seed(i), [(3, 5), (1, 4), (4, 4), (2, 9), (5, 2)][i % 5]
    return (torch.randn(batch, length, D, generator=draw), torch.randn(batch, D, generator=draw)), {}


@case(samples, experts=N)
def samples_that_choose_beside_a_shared_expert():
    return ChosenBesideAShared()


class BySpeaker(Weighed):
    """Layers of an acoustic model, interpolated by an embedding of the speaker."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(10, N)

    def forward(self, x, speaker):
        weights = self.gate(speaker).softmax(-1)[:, None, :, None]
        return (torch.stack([f(x) for f in self.experts], -1) @ weights).squeeze(-1)


@case(beside(lambda b, g: torch.randn(b, 10, generator=g)), experts=N)
def weights_of_a_speaker():
    return BySpeaker()


class ByInterval(nn.Module):
    """One denoiser for each interval of timesteps; a batch holds samples of all."""

    def __init__(self):
        super().__init__()
        self.denoisers = nn.ModuleList(ffn() for _ in range(N))

    def forward(self, x, step):
        interval, y = step * N // STEPS, torch.empty_like(x)
        for number, denoiser in enumerate(self.denoisers):
            mine = interval == number
            if mine.any():
                y[mine] = denoiser(x[mine])
        return y


def samples_of_all_intervals(shape, generator):
    count = shape[0] + N
    steps = (torch.arange(count) * (STEPS // N) + 10) % STEPS
    return (torch.randn(count, shape[1], D, generator=generator), steps), {}


@case(made_by(samples_of_all_intervals), experts=N)
def interval_of_a_timestep():
    return ByInterval()


class LowRank(nn.Module):
    """A frozen layer, and pairs of narrow matrices onto its result."""

    def __init__(self, rank=4):
        super().__init__()
        self.base = nn.Linear(D, HID)
        self.down = nn.ModuleList(nn.Linear(D, rank, bias=False) for _ in range(N))
        self.up = nn.ModuleList(nn.Linear(rank, HID, bias=False) for _ in range(N))

    def pairs(self, x):
        return [up(down(x)) for down, up in zip(self.down, self.up, strict=True)]


class TaskAdapters(LowRank):
    """The weight of each adapter comes from the embedding of the task."""

    def __init__(self):
        super().__init__()
        self.tasks, self.gate = nn.Embedding(3, 6), nn.Linear(6, N, bias=False)

    def forward(self, x, task):
        weights = self.gate(self.tasks(task)).softmax(-1)
        return self.base(x) + sum(weights[:, i, None, None] * one for i, one in enumerate(self.pairs(x)))


@case(beside(lambda b, g: torch.randint(3, (b,), generator=g)), experts=N)
def adapters_weighed_by_task():
    return TaskAdapters()


class LayerAdapters(LowRank):
    """One learned weight for each adapter of the layer, whatever the token."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(N))

    def forward(self, x):
        weights = self.gate.softmax(0)
        return self.base(x) + sum(weights[i] * one for i, one in enumerate(self.pairs(x)))


@case(seq(D), experts=N)
def adapters_weighed_by_layer():
    return LayerAdapters()


class HydraAdapters(LowRank):
    """One narrow matrix down, several up, mixed for each token."""

    def __init__(self):
        super().__init__()
        self.gate, self.scaling = nn.Linear(D, N, bias=False), 2.0

    def forward(self, x):
        y, weights = self.base(x), self.gate(x).softmax(-1, dtype=torch.float32).to(x.dtype)
        for i, up in enumerate(self.up):
            y = y + weights[..., i, None] * up(self.down[0](x)) * self.scaling
        return y


@case(seq(D), experts=N)
def adapters_with_one_matrix_down():
    return HydraAdapters()


class ImageChoice(nn.Module):
    """Two networks of 1x1 convolutions for each image, by its mean color."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(D, HID, 1), nn.ReLU(), nn.Conv2d(HID, D, 1)) for _ in range(N)
        )
        self.gate = nn.Linear(D, N)

    def forward(self, x):
        weights = self.gate(F.adaptive_avg_pool2d(x, 1).flatten(1)).softmax(-1)
        return x + sum(weights[:, i].view(-1, 1, 1, 1) * f(x) for i, f in enumerate(self.experts))


@case(image(D), experts=N)
def weights_of_an_image():
    return ImageChoice()


class GatheredAdapters(nn.Module):
    """A server's batch: each sequence brings the number of its adapter."""

    def __init__(self, count=5, rank=4):
        super().__init__()
        self.base = nn.Linear(D, HID)
        self.down = nn.Parameter(torch.randn(count, D, rank) * 0.2)
        self.up = nn.Parameter(torch.randn(count, rank, HID) * 0.2)

    def forward(self, x, adapter):
        return self.base(x) + x @ self.down[adapter] @ self.up[adapter]


def sequences_with_adapters(shape, generator):
    count = shape[0] + 5
    return (torch.randn(count, shape[1], D, generator=generator), torch.arange(count) % 5), {}


@case(made_by(sequences_with_adapters), experts=5)
def adapter_of_each_sequence():
    return GatheredAdapters()


class SequenceSecond(nn.Module):
    """(S, B, D), as fairseq and CLIP have it: each sequence goes to the two experts that its mean chooses."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(ffn() for _ in range(N))
        self.gate = nn.Linear(D, N)

    def forward(self, x):
        weights, ids = self.gate(x.mean(0)).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sequence, slot = torch.where(ids == number)
            if len(sequence):
                y[:, sequence] += expert(x[:, sequence]) * weights[sequence, slot, None]
        return y


@case(seq(D), experts=N)
def sequences_in_the_second_axis():
    return SequenceSecond()


class SequencesAsRows(nn.Module):
    """(S, B, D): a sequence is one row of S * D numbers to the dispatcher, and goes where its first token chooses."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D)) for _ in range(N))
        self.router = nn.Parameter(torch.randn(D, N))

    def forward(self, x):
        length, batch, _ = x.shape
        score, ids = (x[0] @ self.router).topk(2)
        gates = torch.zeros(batch, N).scatter(1, ids, score.softmax(-1))
        expert, sequence = gates.t().nonzero(as_tuple=True)
        rows = x.permute(1, 0, 2).reshape(batch, -1)
        parts = rows[sequence].split((gates > 0).sum(0).tolist())
        outs = [
            f(p.view(len(p), length, D)).reshape(len(p), length * D) for f, p in zip(self.experts, parts, strict=True)
        ]
        outs = torch.cat(outs) * gates[sequence, expert, None]
        return torch.zeros_like(rows).index_add(0, sequence, outs).view(batch, length, D).permute(1, 0, 2)


@case(seq(D), experts=N)
def sequences_as_rows():
    return SequencesAsRows()

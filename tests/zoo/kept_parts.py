"""Routers that name more experts than they use, and keep a part by a mask; experts on the pixels of a channels-last
image; experts in the order in which somebody named them."""

import torch
from torch import nn

from tests.zoo.case import case, flat, image, made_by, seq

D, N = 16, 5


def mlp(width=24):
    return nn.Sequential(nn.Linear(D, width), nn.GELU(), nn.Linear(width, D))


class Kept(nn.Module):
    """Subclasses say which experts a token may have, and which of them it keeps."""

    def __init__(self):
        super().__init__()
        self.score, self.ffns = nn.Linear(D, N, bias=False), nn.ModuleList(mlp() for _ in range(N))
        nn.init.normal_(self.score.weight, 0, 0.5)

    def run(self, rows, picks, weights, keep):
        y = torch.zeros_like(rows)
        for n, ffn in enumerate(self.ffns):
            at, place = torch.where((picks == n) & keep)
            if at.numel() > 0:
                y.index_add_(0, at, weights[at, place].unsqueeze(-1) * ffn(rows[at]))
        return y


class Nucleus(Kept):
    """Top-p: as many experts as hold 60 % of the probability."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        prob, picks = self.score(rows).softmax(-1).sort(dim=-1, descending=True)
        keep = prob.cumsum(-1) - prob < 0.6
        share = prob * keep
        return self.run(rows, picks, share / share.sum(-1, keepdim=True), keep).view_as(x)


@case(seq(D), experts=N)
def kept_nucleus():
    return Nucleus()


class RunnerUpIfStrong(Kept):
    """The second expert only where it is nearly as good as the first; its weight stays in the tensor either way."""

    def forward(self, x):
        prob, picks = self.score(x).softmax(-1).topk(2, dim=-1)
        strong = prob[:, 1:] > 0.6 * prob[:, :1]
        return self.run(x, picks, prob, torch.cat([torch.ones_like(strong), strong], 1))


@case(flat(D), experts=N)
def kept_runner_up():
    return RunnerUpIfStrong()


class Padded(Kept):
    """Padded tokens are left out of the dispatch by the batch's mask."""

    def forward(self, x, mask):
        rows = x.reshape(-1, D)
        prob, picks = self.score(rows).softmax(-1).topk(2, dim=-1)
        return self.run(rows, picks, prob, mask.reshape(-1, 1)).view_as(x)


@case(
    made_by(lambda s, g: ((torch.randn(*s, D, generator=g), torch.arange(s[1]) < torch.arange(s[0])[:, None] + 2), {})),
    experts=N,
)
def kept_by_padding_mask():
    return Padded()


class AskedPositive(Kept):
    """The weights are spread over all experts, and ``> 0`` asks who serves: nobody, for a token that is NaN."""

    def forward(self, x):
        prob = self.score(x).softmax(-1)
        best, picks = prob.topk(2, dim=-1)
        gates = torch.zeros_like(prob).scatter_(1, picks, best / best.sum(-1, keepdim=True))
        y = torch.zeros_like(x)
        for n, ffn in enumerate(self.ffns):
            mask = gates[:, n] > 0
            if mask.any():
                y[mask] += ffn(x[mask]) * gates[mask, n, None]
        return y


@case(flat(D), experts=N)
def kept_where_positive():
    return AskedPositive()


class PointwiseStage(nn.Module):
    """A depthwise convolution, then norm and experts with the channels last; a learned scale on the way back."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Conv2d(D, D, 5, padding=2, groups=D)
        self.norm, self.score = nn.LayerNorm(D), nn.Linear(D, N, bias=False)
        self.ffns, self.scale = nn.ModuleList(mlp() for _ in range(N)), nn.Parameter(torch.rand(D))

    def forward(self, x):
        h = self.norm(self.spread(x).permute(0, 2, 3, 1))
        rows = h.flatten(0, 2)
        weight, pick = self.score(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for n, ffn in enumerate(self.ffns):
            at, place = torch.where(pick == n)
            y[at] += weight[at, place, None] * ffn(rows[at])
        return x + (self.scale * y.view(h.shape)).permute(0, 3, 1, 2)


@case(image(D), experts=N)
def pixels_with_channels_last():
    return PointwiseStage()


class Faculties(nn.Module):
    """Experts by name, in no alphabetical order; all of them serve every token."""

    names = ("physics", "law", "music", "botany")

    def __init__(self, mean=False):
        super().__init__()
        self.score = nn.Linear(D, len(self.names))
        self.ffns = nn.ModuleDict({name: mlp() for name in self.names})
        self.mean = mean

    def forward(self, x):
        share = self.score(x).softmax(-1)
        parts = [share[..., n : n + 1] * self.ffns[name](x) for n, name in enumerate(self.names)]
        return torch.stack(parts).mean(0) if self.mean else sum(parts) / len(parts)


@case(seq(D), experts=4)
def experts_by_name():
    return Faculties()


@case(seq(D), experts=4)
def experts_by_name_and_a_mean():
    return Faculties(mean=True)

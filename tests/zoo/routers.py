"""Routers: whatever chooses ids and weights, the experts behind them stay the same."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, seq

D, M, E, K = 24, 16, 8, 2


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*io, bias=False) for io in ((D, M), (D, M), (M, D)))

    def forward(self, x):
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Routed(nn.Module):
    """The experts' side; a subclass gives ``choose(x) -> ids, weights``."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.ffs = nn.ModuleList([FeedForward() for _ in range(E)])

    def dispatch(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in torch.unique(ids).tolist():
            if not 0 <= e < E:
                continue
            tok, slot = (ids == e).nonzero(as_tuple=True)
            out.index_add_(0, tok, (self.ffs[e](x[tok]) * weights[tok, slot, None]).to(out.dtype))
        return out

    def forward(self, x):
        flat_x = x.reshape(-1, D)
        return self.dispatch(flat_x, *self.choose(flat_x)).reshape(x.shape)


class TopKSoftmax(Routed):
    def choose(self, x):
        logits, ids = self.gate(x).topk(K)
        return ids, logits.softmax(-1)


class TopKSigmoid(Routed):
    def choose(self, x):
        logits, ids = self.gate(x).topk(K)
        return ids, logits.sigmoid()


class RenormEps(Routed):
    def choose(self, x):
        w, ids = self.gate(x).sigmoid().topk(K)
        return ids, w / (w.sum(-1, keepdim=True) + 1e-6)


class NoAuxTC(Routed):
    """DeepSeek-V3: sigmoid, a bias for the choice only, group limit, renormalise, scale."""

    fill, group_best = float("-inf"), 2

    def __init__(self):
        super().__init__()
        self.e_score_correction_bias = nn.Parameter(torch.randn(E) * 0.3)

    def choose(self, x):
        scores = F.linear(x.float(), self.gate.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias.unsqueeze(0)
        group_scores = choice.view(-1, 4, E // 4).topk(self.group_best, dim=-1)[0].sum(dim=-1)
        group_idx = torch.topk(group_scores, k=2, dim=-1, sorted=False)[1]
        group_mask = torch.zeros_like(group_scores).scatter_(1, group_idx, 1)
        score_mask = group_mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
        choice = choice.masked_fill(~score_mask.bool(), self.fill)
        ids = torch.topk(choice, k=3, dim=-1, sorted=False)[1]
        w = scores.gather(1, ids)
        return ids, w / (w.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


class NoAuxTCZeroFill(NoAuxTC):
    """The older fill: a masked group can still win when the kept keys are negative."""

    fill, group_best = 0.0, 1


class PNorm(Routed):
    def choose(self, x):
        w, ids = self.gate(x).softmax(-1, dtype=torch.float32).topk(3)
        return ids, w / torch.norm(w, p=1.5, dim=-1, keepdim=True)


class PerExpertScale(Routed):
    def __init__(self):
        super().__init__()
        self.per_expert_scale = nn.Parameter(torch.rand(E) + 0.5)
        self.scale = nn.Parameter(torch.rand(D) + 0.5)

    def choose(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale * D**-0.5
        w, ids = self.gate(h).softmax(-1).topk(K)
        return ids, w / w.sum(-1, keepdim=True) * self.per_expert_scale[ids]


class NoisyTopK(Routed):
    def __init__(self):
        super().__init__()
        self.noise = nn.Linear(D, E)

    def choose(self, x):
        logits = self.gate(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        top, ids = logits.topk(K, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, ids, top)
        return ids, F.softmax(sparse, dim=-1).gather(-1, ids)


class SqrtSoftplus(Routed):
    def choose(self, x):
        score = F.softplus(self.gate(x)).sqrt()
        w, ids = score.topk(K, -1)
        return ids, w / w.sum(-1, keepdim=True).clamp(min=1e-12) * 1.5


class SoftcapCosine(Routed):
    """Cosine router with a learned temperature and a tanh softcap."""

    def __init__(self):
        super().__init__()
        self.sim = nn.Parameter(torch.randn(D, E))
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def choose(self, x):
        logits = F.normalize(x, dim=-1) @ F.normalize(self.sim, dim=0) * self.temperature.exp()
        w, ids = (30.0 * torch.tanh(logits / 30.0)).softmax(-1).topk(K)
        return ids, w


class SparseMixer(Routed):
    """PhiMoE's: two masked softmaxes, the second without the first winner."""

    def choose(self, x, jitter=0.01):
        scores = self.gate(x)
        ids, weights, left = [], [], scores
        for _ in range(2):
            top, i = left.max(dim=-1, keepdim=True)
            factor = scores.abs().clamp(min=top)
            mask = ((top - scores) / factor) > (2 * jitter)
            weights.append(left.masked_fill(mask, float("-inf")).softmax(-1).gather(-1, i))
            ids.append(i)
            left = torch.scatter(left, -1, i, float("-inf"))
        return torch.cat(ids, -1), torch.cat(weights, -1)


class MLPRouter(Routed):
    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, E))

    def choose(self, x):
        w, ids = self.gate(x).softmax(-1).topk(3)
        return ids, w


class AllOfThem(Routed):
    def choose(self, x):
        return torch.arange(E).expand(x.shape[0], E), self.gate(x).softmax(-1)


class DuplicateIds(Routed):
    """Two heads choose independently, so a token may name the same expert twice: both count."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(D, E)

    def choose(self, x):
        a, b = self.gate(x).softmax(-1).max(-1), self.second(x).softmax(-1).max(-1)
        return torch.stack([a.indices, b.indices], -1), torch.stack([a.values, b.values], -1)


class ZeroExperts(Routed):
    """LongCat: ids at and beyond E are identity experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E + 3, bias=False)

    def choose(self, x):
        w, ids = self.gate(x).softmax(-1).topk(3)
        return ids, w * 2

    def dispatch(self, x, ids, weights):
        zero = torch.where(ids >= E, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
        return super().dispatch(x, ids, weights) + x * zero


class NegativeWeights(Routed):
    def choose(self, x):
        w, ids = self.gate(x).abs().topk(K)
        return ids, torch.gather(self.gate(x), 1, ids)


def register(cls):
    def build():
        return cls()

    build.__name__ = "router_" + "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).strip("_")
    case(seq(D), experts=E)(build)


for _cls in (TopKSoftmax, TopKSigmoid, RenormEps, NoAuxTC, NoAuxTCZeroFill, PNorm, PerExpertScale, NoisyTopK):
    register(_cls)
for _cls in (
    SqrtSoftplus,
    SoftcapCosine,
    SparseMixer,
    MLPRouter,
    AllOfThem,
    DuplicateIds,
    ZeroExperts,
    NegativeWeights,
):
    register(_cls)


class AboveZero(Routed):
    """Weights under a threshold are zero, and the loop asks ``> 0``: a row of NaN goes to no expert."""

    def table(self, h):
        p = self.gate(h).softmax(-1)
        return torch.where(p > 0.2, p, torch.zeros_like(p))

    def forward(self, x):
        h = x.reshape(-1, D)
        w = self.table(h)
        out = torch.zeros_like(h)
        for e, ff in enumerate(self.ffs):
            mine = w[:, e] > 0
            if mine.any():
                out[mine] += w[mine, e].unsqueeze(-1) * ff(h[mine])
        return out.view_as(x)


class ScoresAboveZero(AboveZero):
    """Raw scores, of which only the positive ones count."""

    def table(self, h):
        return self.gate(h)


@case(seq(D), experts=E)
def router_weights_above_zero():
    return AboveZero()


@case(seq(D), experts=E)
def router_scores_above_zero():
    return ScoresAboveZero()

"""Routers: hidden states (and what else the model is given) to ids and weights.

Shape legend: T tokens, E experts, K chosen per token, G groups, H hidden.
A router returns ``(ids_TK, weights_TK, logits_TE)``; ids is None where all experts are weighted, (T, E).
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.property.configs import read
from tests.property.scores import SCORES
from tests.property.spec import Program
from tests.property.surroundings import at_least_float32, softcap

VOCABULARY = range(50)
"""Token ids of hash routers; the first choice of id v is expert v mod E."""


class Route(nn.Module):
    def __init__(self, p: Program, config=None):
        super().__init__()
        self.p, self.config = p, config
        r = p.router
        if r.kind != "given" and r.linear:
            self.gate = nn.Linear(p.hidden, p.experts, bias=r.bias)
        elif r.kind != "given":
            self.weight = nn.Parameter(torch.randn(p.experts, p.hidden) * 0.5)
            self.bias = nn.Parameter(torch.randn(p.experts) * 0.3) if r.bias else None
        if r.copied and r.kind != "given":
            with torch.no_grad():
                rows = self.rows
                rows[p.experts // 2 :] = rows[: p.experts - p.experts // 2].clone()
        if "bias" in r.kind:
            self.register_buffer("correction", torch.randn(p.experts) * 0.2)
        if r.per_expert_scale:
            self.expert_scale = nn.Parameter(0.5 + torch.rand(p.experts))
        if r.kind == "hash":
            others = [
                torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(p.experts - 1)]) for _ in VOCABULARY
            ]
            table = torch.stack([(v + row) % p.experts for v, row in zip(VOCABULARY, others, strict=True)])
            self.register_buffer("table", table[:, : self.k].contiguous())

    @property
    def rows(self):
        """(E, H): the weight of the logits; None where there are none."""
        return self.gate.weight if self.p.router.linear else getattr(self, "weight", None)

    @property
    def k(self):
        return self.p.top_k if self.config is None else read(self.config, "top_k")

    def logits(self, x):
        r = self.p.router
        if r.linear:
            logits = self.gate(x)
        elif r.float32:
            bias = None if self.bias is None else at_least_float32(self.bias)
            logits = F.linear(at_least_float32(x), at_least_float32(self.weight), bias)
        else:
            logits = F.linear(x, self.weight, self.bias)
        if r.gain != 1.0:
            logits = logits * r.gain
        return softcap(logits, r.softcap) if r.softcap else logits

    def forward(self, x, *given):
        if self.p.router.kind == "given":
            ids, weights = given
            return ids.reshape(-1, self.k), self.finish(ids.reshape(-1, self.k), weights.reshape(-1, self.k), x), None
        logits = self.logits(x)
        ids, weights = (KINDS | SCORED)[self.p.router.kind](self, logits, *given)
        return ids, self.finish(ids, weights, x), logits

    def finish(self, ids, weights, x):
        """Renormalise, scale, cast."""
        r = self.p.router
        total = weights.sum(-1, keepdim=True)
        if self.config is not None and not read(self.config, "norm"):
            pass
        elif r.renormalize.startswith("sum"):
            weights = weights / (total + float(r.renormalize[4:] or 0.0)) if "+" in r.renormalize else weights / total
        elif r.renormalize == "max1e-12":
            weights = weights / total.clamp(min=1e-12)
        scale = r.scale if self.config is None else read(self.config, "scale")
        if scale != 1.0:
            weights = weights * scale
        if r.per_expert_scale:
            weights = weights * (self.expert_scale[ids] if ids is not None else self.expert_scale)
        return weights if r.keep_float32 else weights.to(x.dtype)

    def limited(self, scores):
        """Scores of the groups that are not among the best half are masked."""
        r = self.p.router
        if r.groups == 1:
            return scores
        grouped = scores.view(-1, r.groups, self.p.experts // r.groups)
        best = grouped.max(-1).values if r.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        kept = best.topk(max(1, r.groups // 2), dim=-1).indices
        mask = torch.zeros_like(best).scatter_(1, kept, 1).unsqueeze(-1).expand_as(grouped).reshape(scores.shape)
        return scores.masked_fill(mask == 0, float("-inf") if r.group_fill == "-inf" else 0.0)


def softmax_topk(route, logits):
    probs = logits.softmax(-1)
    ids = route.limited(probs).topk(route.k, dim=-1).indices
    return ids, probs.gather(-1, ids)


def softmax_topk_values(route, logits):
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=at_least_float32(logits).dtype), route.k, dim=-1)
    return ids, weights


def topk_softmax(route, logits):
    top, ids = torch.topk(logits, route.k, dim=-1)
    return ids, torch.softmax(top, dim=-1)


def topk_sigmoid(route, logits):
    top, ids = torch.topk(logits, route.k, dim=-1)
    return ids, torch.sigmoid(top)


def masked_softmax(route, logits):
    """top-k of the logits; a softmax over all, with minus infinity at the rest; gathered."""
    ids = logits.topk(route.k, dim=-1).indices
    masked = torch.full_like(logits, float("-inf")).scatter(-1, ids, logits.gather(-1, ids))
    return ids, masked.softmax(-1).gather(-1, ids)


def sigmoid_topk(route, logits):
    scores = logits.sigmoid()
    ids = torch.topk(route.limited(scores), route.k, dim=-1, sorted=False)[1]
    return ids, scores.gather(-1, ids)


def sigmoid_bias(route, logits):
    scores = logits.sigmoid()
    key = route.limited(scores + route.correction.to(scores.dtype))
    ids = torch.topk(key, k=route.k, dim=-1)[1]
    return ids, scores.gather(-1, ids)


def softmax_bias(route, logits):
    scores = logits.softmax(-1)
    ids = route.limited(scores + route.correction.to(scores.dtype)).argsort(-1, descending=True)[..., : route.k]
    return ids, scores.gather(-1, ids)


def sqrt_softplus(route, logits):
    scores = F.softplus(logits).sqrt()
    ids = scores.topk(route.k, dim=-1).indices
    return ids, scores.gather(-1, ids)


def argmax(route, logits):
    ids = logits.argmax(-1, keepdim=True)
    return ids, logits.softmax(-1).gather(-1, ids)


def max_values(route, logits):
    weights, ids = logits.softmax(-1).max(-1)
    return ids.unsqueeze(-1), weights.unsqueeze(-1)


def unweighted(route, logits):
    ids = logits.topk(route.k, dim=-1).indices
    return ids, torch.full_like(ids, 1.0 / route.k, dtype=logits.dtype)


def hashed(route, logits, token_ids):
    ids = route.table[token_ids.reshape(-1)]
    return ids, logits.softmax(-1).gather(-1, ids)


def position_by_division(route, logits):
    """The expert is a hash of the token's flat index: integer arithmetic, which is exact for any number of tokens."""
    index = torch.arange(logits[..., 0].numel(), device=logits.device).view(logits.shape[:-1])
    first = torch.div(index * (index + 1) * 40009 + index, 7, rounding_mode="trunc").unsqueeze(-1)
    ids = (first + torch.arange(route.k, device=logits.device)) % route.p.experts
    return ids, logits.softmax(-1).gather(-1, ids)


def score_topk(route, logits):
    """The experts of the largest scores; the scores are the weights."""
    scores = SCORES[route.p.router.score](logits)
    ids = route.limited(scores).topk(route.k, dim=-1).indices
    return ids, scores.gather(-1, ids)


def score_bias_topk(route, logits):
    """A correction is added for the choice only."""
    scores = SCORES[route.p.router.score](logits)
    ids = route.limited(scores + route.correction.to(scores.dtype)).topk(route.k, dim=-1).indices
    return ids, scores.gather(-1, ids)


def topk_score(route, logits):
    """The experts of the largest logits; the weights are scores of these logits."""
    top, ids = logits.topk(route.k, dim=-1)
    return ids, SCORES[route.p.router.score](top)


def dense_softmax(route, logits):
    return None, logits.softmax(-1)


def dense_sigmoid(route, logits):
    return None, logits.sigmoid()


KINDS = {
    "softmax_topk": softmax_topk,
    "softmax_topk_values": softmax_topk_values,
    "topk_softmax": topk_softmax,
    "topk_sigmoid": topk_sigmoid,
    "masked_softmax": masked_softmax,
    "sigmoid_topk": sigmoid_topk,
    "sigmoid_bias": sigmoid_bias,
    "softmax_bias": softmax_bias,
    "sqrt_softplus": sqrt_softplus,
    "argmax": argmax,
    "max_values": max_values,
    "unweighted": unweighted,
    "hash": hashed,
    "given": None,
    "dense_softmax": dense_softmax,
    "dense_sigmoid": dense_sigmoid,
}
GROUP_LIMITED = ("softmax_topk", "sigmoid_topk", "sigmoid_bias", "softmax_bias")
TOP_1 = ("argmax", "max_values")
DENSE = ("dense_softmax", "dense_sigmoid")
SCORED = {
    "score_topk": score_topk,
    "score_bias_topk": score_bias_topk,
    "topk_score": topk_score,
    "position_by_division": position_by_division,
}
"""Kinds of wide.py, beside ``KINDS``."""

"""One matmul for all experts: grouped_mm over sorted rows, bmm and einsum over gathered weights."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


class GroupedMM(nn.Module):
    """Sort, two grouped matmuls over stacked weights, inverse permutation, sum over the K slots."""

    def __init__(self, d=32, f=32, n=4, k=2):
        super().__init__()
        self.k, self.n = k, n
        self.w13 = nn.Parameter(torch.randn(n, d, 2 * f) * d**-0.5)
        self.w2 = nn.Parameter(torch.randn(n, f, d) * f**-0.5)
        self.gate = nn.Linear(d, n, bias=False)

    def forward(self, x):
        t = x.view(-1, x.size(-1))
        top_scores, ids = self.gate(t).softmax(-1).topk(self.k)
        flat_ids = ids.reshape(-1)
        perm = torch.argsort(flat_ids)
        offs = torch.histc(flat_ids.float(), bins=self.n, min=0, max=self.n - 1).cumsum(0).to(torch.int32)
        rows = t[perm // self.k]
        h = F.grouped_mm(rows, self.w13, offs=offs)
        g, u = h.chunk(2, -1)
        out = F.grouped_mm(F.silu(g) * u, self.w2, offs=offs) * top_scores.reshape(-1)[perm, None]
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.numel())
        return out[inverse].view(-1, self.k, x.size(-1)).sum(1).view_as(x)


@case(seq(32), experts=4)
def grouped_mm_sorted():
    return GroupedMM()


class GatheredWeights(nn.Module):
    """Every (token, slot) row gathers its own matrices: bmm with ``w[ids]``."""

    def __init__(self, d=24, f=16, n=5, k=2):
        super().__init__()
        self.k = k
        self.gate_up = nn.Parameter(torch.randn(n, 2 * f, d) * d**-0.5)
        self.down = nn.Parameter(torch.randn(n, d, f) * f**-0.5)
        self.gate = nn.Linear(d, n, bias=False)

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(self.k)
        e = ids.flatten()
        rows = x.repeat_interleave(self.k, dim=0).unsqueeze(-1)
        g, u = torch.bmm(self.gate_up[e], rows).squeeze(-1).chunk(2, -1)
        o = torch.bmm(self.down[e], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (o * w.reshape(-1, 1)).view(x.shape[0], self.k, -1).sum(1)


class GptFast(GatheredWeights):
    """The same by einsum over gathered weights, K kept as an axis."""

    def forward(self, x):
        scores = F.softmax(self.gate(x), dim=-1)
        expert_weights, expert_indices = torch.topk(scores, self.k, dim=-1)
        expert_weights /= expert_weights.sum(dim=-1, keepdim=True)
        w1, w3 = self.gate_up[expert_indices].chunk(2, dim=2)
        x1 = F.silu(torch.einsum("ti,taoi->tao", x, w1))
        x3 = torch.einsum("ti, taoi -> tao", x, w3)
        expert_outs = torch.einsum("tao, taio -> tai", x1 * x3, self.down[expert_indices])
        return torch.einsum("tai,ta -> ti", expert_outs, expert_weights)


@case(flat(24), experts=5)
def gathered_bmm():
    return GatheredWeights()


@case(flat(24), experts=8)
def gathered_gpt_fast():
    return GptFast(n=8)

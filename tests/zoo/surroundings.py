"""What stands around the experts: shared experts, scales, latent projections, aux outputs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, made_by, seq


class Expert(nn.Module):
    def __init__(self, dim, inner, bias=False):
        super().__init__()
        self.w1 = nn.Linear(dim, inner, bias=bias)
        self.w2 = nn.Linear(inner, dim, bias=bias)
        self.w3 = nn.Linear(dim, inner, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """The plain one that the rest of this file varies."""

    def __init__(self, dim=20, inner=28, n=4, k=2):
        super().__init__()
        self.n, self.k = n, k
        self.gate = nn.Linear(dim, n, bias=False)
        self.experts = nn.ModuleList(Expert(dim, inner) for _ in range(n))

    def route(self, x):
        logits = self.gate(x)
        w, idx = torch.topk(F.softmax(logits.float(), dim=-1), self.k)
        return logits, (w / w.sum(-1, keepdim=True)).to(x.dtype), idx

    def apply_experts(self, x, w, idx):
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            batch_idx, nth = torch.where(idx == i)
            if batch_idx.numel():
                y[batch_idx] += w[batch_idx, nth, None] * expert(x[batch_idx])
        return y

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        _, w, idx = self.route(h)
        return self.apply_experts(h, w, idx).view_as(x)


class SharedAdded(MoE):
    def __init__(self):
        super().__init__()
        self.shared = Expert(20, 56)

    def forward(self, x):
        return super().forward(x) + self.shared(x)


@case(seq(20), experts=4)
def around_shared_added():
    return SharedAdded()


class SharedMean(SharedAdded):
    """Snowflake-like mean of both, then an output scale and a learned output bias."""

    def __init__(self):
        super().__init__()
        self.out_bias = nn.Parameter(torch.randn(20))

    def forward(self, x):
        return super().forward(x) / 2 * 1.7 + self.out_bias


@case(seq(20), experts=4)
def around_shared_mean_scale_bias():
    return SharedMean()


class Latent(MoE):
    """Experts work in a narrower space: projections before and after, router on the full one."""

    def __init__(self):
        super().__init__(dim=12)
        self.gate, self.down, self.up = nn.Linear(20, 4), nn.Linear(20, 12, bias=False), nn.Linear(12, 20, bias=False)

    def forward(self, x):
        h = x.flatten(0, 1)
        _, w, idx = self.route(h)
        return self.up(self.apply_experts(self.down(h), w, idx)).view_as(x)


@case(seq(20), experts=4)
def around_latent_projections():
    return Latent()


class LoadBalanced(MoE):
    """Returns (y, aux loss, router logits); the loss is computed in eval as well."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        logits, w, idx = self.route(h)
        load = F.one_hot(idx, self.n).float().mean((0, 1))
        aux = self.n * (load * logits.softmax(-1).mean(0)).sum()
        z = torch.logsumexp(logits, -1).square().mean()
        return self.apply_experts(h, w, idx).view_as(x), aux + 1e-3 * z, logits


@case(seq(20), experts=4)
def around_aux_tuple():
    return LoadBalanced()


@dataclass
class MoEOutput:
    hidden: torch.Tensor
    router_logits: torch.Tensor
    loss: torch.Tensor | None = None
    name: str = "moe"


class DataclassOut(MoE):
    def forward(self, x, return_dict=False):
        h = x.view(-1, x.shape[-1])
        logits, w, idx = self.route(h)
        y = self.apply_experts(h, w, idx).view_as(x)
        if return_dict:
            return {"y": y, "extras": {"ids": idx, "weights": [w, logits]}, "k": self.k}
        return MoEOutput(y, logits)


@case(seq(20), experts=4)
def around_dataclass_output():
    return DataclassOut()


@case(made_by(lambda s, g: ((torch.randn(*s, 20, generator=g),), {"return_dict": True})), experts=4)
def around_dict_output():
    return DataclassOut()


class KeepsLoss(MoE):
    """Leaves its loss on self for the trainer to pick up."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        logits, w, idx = self.route(h)
        self.aux_loss = logits.softmax(-1).mean(0).square().sum() * self.n
        self.last_ids = idx
        return self.apply_experts(h, w, idx).view_as(x)


class CollectsLosses(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([KeepsLoss(), KeepsLoss()])

    def forward(self, x):
        for b in self.blocks:
            x = x + b(x)
        return x, sum(m.aux_loss for m in self.modules() if isinstance(m, KeepsLoss)), self.blocks[1].last_ids


@case(seq(20), experts=4, moe=2)
def around_aux_loss_attribute():
    return CollectsLosses()


class AfterRecurrence(nn.Module):
    """A GRU and one step of its cell before the block: torch writes through unsafe_split and transposes in place."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(20, 20, batch_first=True)
        self.cell = nn.GRUCell(20, 20)
        self.moe = MoE()

    def forward(self, x):
        return self.moe((self.gru(x)[0] + self.cell(x[:, 0]).unsqueeze(1)).contiguous())


@case(seq(20), experts=4)
def around_recurrent_layers():
    return AfterRecurrence()

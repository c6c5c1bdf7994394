"""Sixteen bits and sixty-four, with the router, the GEMMs or the sum in another dtype."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq
from tests.zoo.surroundings import MoE


class HalfModel(MoE):
    """bfloat16 weights; the router runs in float32 on an upcast copy."""

    def __init__(self, dtype):
        super().__init__()
        self.to(dtype)
        self.gate = nn.Linear(20, 4, bias=False)

    def route(self, x):
        logits = self.gate(x.float())
        w, idx = logits.softmax(-1).topk(self.k)
        return logits, (w / w.sum(-1, keepdim=True)).to(x.dtype), idx


@case(seq(20, torch.bfloat16), experts=4)
def dtype_bfloat16_float32_router():
    return HalfModel(torch.bfloat16)


@case(seq(20, torch.float16), experts=4)
def dtype_float16():
    return HalfModel(torch.float16)


class AllBFloat16(MoE):
    """Weights stay float32 in the product, the sum too; cast at the end."""

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        w, idx = self.gate(h).float().softmax(-1).topk(self.k)
        y = torch.zeros(h.shape, dtype=torch.float32)
        for i in range(self.n):
            r, c = torch.where(idx == i)
            y.index_add_(0, r, self.experts[i](h[r]) * w[r, c, None])
        return y.to(x.dtype).view_as(x)


@case(seq(20, torch.bfloat16), experts=4)
def dtype_bfloat16_float32_accumulator():
    return AllBFloat16().to(torch.bfloat16)


class Float32Gemms(MoE):
    """A bfloat16 model whose experts compute in float32."""

    def apply_experts(self, x, w, idx):
        y = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            r, c = torch.where(idx == i)
            h = F.silu(x[r].float() @ e.w1.weight.float().t()) * (x[r].float() @ e.w3.weight.float().t())
            y.index_add_(0, r, ((h @ e.w2.weight.float().t()) * w[r, c, None]).to(y.dtype))
        return y


@case(seq(20, torch.bfloat16), experts=4)
def dtype_experts_compute_in_float32():
    return Float32Gemms().to(torch.bfloat16)


@case(flat(20, torch.float64), experts=4)
def dtype_float64():
    return MoE().double()

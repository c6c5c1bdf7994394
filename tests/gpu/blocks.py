"""Blocks wide enough to be worth a GPU's while, and a tiny language model; both built on the CPU with seeds."""

import torch
import torch.nn.functional as F
from torch import nn

E, K, H, I = 16, 4, 256, 384


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = (
            nn.Linear(H, I, bias=False),
            nn.Linear(H, I, bias=False),
            nn.Linear(I, H, bias=False),
        )

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Softmax in float32, top-k, renormalised, a loop over experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x):
        rows = x.reshape(-1, H)
        weights, ids = torch.topk(F.softmax(self.gate(rows), -1, dtype=torch.float32), K, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(rows.dtype)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                y.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return y.view(x.shape)


def mixture(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Mixture().eval().to(dtype)


def tokens(count: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, count, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def language_model(dtype: torch.dtype) -> nn.Module:
    """A Qwen3-MoE of two layers; widths are what CUDA's MoE kernel takes in 16 bits."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256, initializer_range=0.2, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)

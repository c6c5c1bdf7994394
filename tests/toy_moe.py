"""Blocks small enough to optimise in a tenth of a second, for tests of what happens around a rewrite."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import moeopt

H, E, K = 16, 4, 2  # square experts: a transposed weight still fits


class Expert(nn.Module):
    def __init__(self, hidden: int = H, inner: int = H, dropout: float = 0.0):
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.w2(self.act(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Softmax, top-k, renormalised, a loop over the experts that are hit; subclasses change one thing."""

    def __init__(self, experts: int = E, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Linear(H, experts, bias=False)
        self.experts = nn.ModuleList(Expert(dropout=dropout) for _ in range(experts))
        self.top_k, self.renormalise = K, True

    def route(self, x):
        p = F.softmax(self.gate(x), -1)
        w, ids = torch.topk(p, self.top_k, -1)
        return ids, w / w.sum(-1, keepdim=True) if self.renormalise else w

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            y.index_add_(0, token, (expert(x[token]) * w[token, slot, None]).to(y.dtype))
        return y

    def forward(self, x):
        rows = x.reshape(-1, H)
        return self.loop(rows, *self.route(rows)).view(x.shape)


def build(cls: type[nn.Module] = Block, **kwargs: Any) -> nn.Module:
    """The same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return cls(**kwargs).eval()


def seeded(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = seeded(2, 8, H)


def optimized(model: nn.Module, inputs: Any = X, **options: Any) -> moeopt.Optimized:
    """``optimize``, with every MoE block rewritten; not verified, which is most of the time, unless a test asks."""
    out = moeopt.optimize(model, inputs, **{"verify": "off", **options})
    moe = [b for b in out.report.blocks if b.kind == "moe"]
    assert moe and all(b.status == "rewritten" for b in moe), str(out.report)
    return out


def close(got: torch.Tensor, want: torch.Tensor, eps: float = 32) -> None:
    """Equal within ``eps`` roundings in relative L2: the sums of one block run in another order."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    far, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert far <= eps * torch.finfo(want.dtype).eps * size, f"{far:.3g} apart at norm {size:.3g}"


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    """More than any rounding apart: guards a test against comparing a thing with itself."""
    return bool((a - b).norm() > 1e-2 * b.norm())


@functools.cache
def mixtral(**changes: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
           "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2} | changes
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@functools.cache
def qwen3_moe(**changes: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
           "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4,
           "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


IDS = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))

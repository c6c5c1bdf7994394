"""Models whose experts go on several ranks; each is small, and each changes one thing about where weights lie."""

import torch
from torch import nn

import moeopt
from tests.toy_moe import Block, H


class Layers(nn.Module):
    """Two blocks, each with a residual, so that an error can name the second."""

    def __init__(self, blocks: int = 2, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(Block(**kwargs) for _ in range(blocks))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Stacked(nn.Module):
    """One Parameter for all gates and ups and one for all downs, as transformers has; experts lie along ``axis``."""

    def __init__(self, experts: int = 5, top_k: int = 2, inner: int = 24, axis: int = 0, bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(H, experts, bias=False)
        shapes = ([experts, 2 * inner, H], [experts, H, inner])
        self.w_in, self.w_out = (nn.Parameter(torch.randn(s).movedim(0, axis).contiguous() * 0.2) for s in shapes)
        self.b_in = nn.Parameter(torch.randn(experts, 2 * inner) * 0.2) if bias else None
        self.top_k, self.axis, self.count = top_k, axis, experts

    def forward(self, x):
        rows = x.reshape(-1, H)
        w, ids = torch.topk(self.gate(rows).softmax(-1), self.top_k, -1)
        y = torch.zeros_like(rows)
        for e in range(self.count):
            token, slot = torch.where(ids == e)
            h = rows[token] @ self.w_in.select(self.axis, e).t()
            g, u = (h if self.b_in is None else h + self.b_in[e]).chunk(2, -1)
            o = (torch.nn.functional.silu(g) * u) @ self.w_out.select(self.axis, e).t()
            y.index_add_(0, token, o * w[token, slot, None])
        return y.view(x.shape)


def tokens(count: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def optimised(
    cls: type[nn.Module] = Block, dtype: torch.dtype = torch.float32, quantize: str | None = None, **kwargs
) -> moeopt.Optimized:
    """With the same weights on every rank; not verified, for that is another test's."""
    torch.manual_seed(0)
    model = cls(**kwargs).eval().to(dtype)
    opt = moeopt.optimize(model, tokens(10, dtype=dtype), verify="off", quantize=quantize)
    assert opt.report.rewritten, str(opt.report)
    return opt

"""Experts that are not a two-matrix MLP, or own odd parameters: rewritten or declined, never wrong."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo.case import case, flat, seq, token_ids


class Top2(nn.Module):
    def __init__(self, make, d=16, n=4):
        super().__init__()
        self.router = nn.Linear(d, n)
        self.experts = nn.ModuleList([make(i) for i in range(n)])

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, idx = self.router(h).softmax(-1).topk(2)
        out = 0
        for i, expert in enumerate(self.experts):
            weight = (w * (idx == i)).sum(-1)
            rows = (idx == i).any(-1).nonzero(as_tuple=True)[0]
            out = out + torch.zeros_like(h).index_copy(0, rows, weight[rows, None] * expert(h[rows]))
        return out.view_as(x)


class Residual(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


class Masked(nn.Module):
    """A pruned linear: weight times a 0/1 buffer at every call."""

    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i) * 0.3)
        self.register_buffer("mask", (torch.rand(o, i) > 0.5).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask)


class Lora(nn.Module):
    """One frozen linear and a low-rank update of its own."""

    def __init__(self, i, o, r=4):
        super().__init__()
        self.base = nn.Linear(i, o)
        self.a, self.b = nn.Linear(i, r, bias=False), nn.Linear(r, o, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


class Int8(nn.Module):
    """Weight-only int8, dequantised in forward."""

    def __init__(self, i, o):
        super().__init__()
        w = torch.randn(o, i)
        scale = w.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (w / scale).round().to(torch.int8))
        self.register_buffer("scale", scale * 0.3)

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scale)


class DynamicScale(nn.Module):
    """The expert looks at its whole batch: the result of a row depends on its neighbours."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h / (h.mean() + 1.0)) if x.shape[0] else x


def two(a, b):
    return nn.Sequential(a, nn.ReLU(), b)


def register(name, make, *, expect="either", moe=None, reason="", **more):
    def build():
        return Top2(make)

    build.__name__ = name
    case(seq(16), experts=4, expect=expect, moe=moe, reason=reason, **more)(build)


register(
    "strange_layernorm_inside",
    lambda i: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)),
    moe=1,
)
register("strange_three_layers", lambda i: two(two(nn.Linear(16, 24), nn.Linear(24, 20)), nn.Linear(20, 16)), moe=1)
register("strange_single_linear", lambda i: nn.Linear(16, 16), moe=1)
register(
    "strange_linear_linear", lambda i: nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)), moe=1
)
register("strange_residual_inside", lambda i: Residual(two(nn.Linear(16, 24), nn.Linear(24, 16))), moe=1)
register("strange_weight_norm", lambda i: two(weight_norm(nn.Linear(16, 24)), nn.Linear(24, 16)), moe=1)
register("strange_pruning_mask", lambda i: two(Masked(16, 24), Masked(24, 16)), moe=1)
register("strange_lora", lambda i: two(Lora(16, 24), Lora(24, 16)))  # base and low-rank pairs: four readings
register("strange_int8", lambda i: two(Int8(16, 24), Int8(24, 16)), moe=1)
register(
    "strange_batch_statistics", lambda i: DynamicScale(), expect="declined", moe=1, reason="row|token|depend|batch|mix"
)
register("strange_scalar_scale", lambda i: two(nn.Linear(16, 24), ScaledLinear(24, 16)))
register(
    "strange_norm_after",
    lambda i: nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16), nn.RMSNorm(16)),
    moe=1,
)


class ScaledLinear(nn.Linear):
    """A learned scalar per expert on the output."""

    def __init__(self, i, o):
        super().__init__(i, o)
        self.alpha = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.alpha


def count_rows(module, args, output):
    module.rows_seen += args[0].shape[0]
    return output * 0.5


class Hooked(Top2):
    """A forward hook on expert 1 halves its output and counts rows."""

    def __init__(self):
        super().__init__(lambda i: two(nn.Linear(16, 24), nn.Linear(24, 16)))
        self.experts[1].register_buffer("rows_seen", torch.zeros((), dtype=torch.long))
        self.experts[1].register_forward_hook(count_rows)


@case(seq(16), experts=4, expect="either", moe=1, reason="hook", check_state=("experts.1.rows_seen",))
def strange_forward_hook():
    return Hooked()


class IdentityOrMLP(Top2):
    """Mixture of depths by hand: expert 0 copies, the others compute."""

    def __init__(self):
        super().__init__(lambda i: two(nn.Linear(16, 24), nn.Linear(24, 16)) if i else nn.Identity())


@case(seq(16), experts=4, expect="either", moe=None)
def strange_identity_expert():
    return IdentityOrMLP()


class MoLELookup(nn.Module):
    """Mixture of lookup experts at inference: each expert became a table of token ids."""

    def __init__(self, vocab=30, d=16, n=4):
        super().__init__()
        self.emb, self.router = nn.Embedding(vocab, d), nn.Linear(d, n)
        self.tables = nn.ModuleList([nn.Embedding(vocab, d) for _ in range(n)])

    def forward(self, ids):
        h = self.emb(ids)
        w = self.router(h).softmax(-1)
        return h + sum(w[..., i : i + 1] * t(ids) for i, t in enumerate(self.tables))


@case(token_ids(30), experts=4, expect="either", moe=0)
def strange_mole_lookup():
    return MoLELookup()


class ProductKeys(nn.Module):
    """PEER: top-k of two half-keys picks rows of two embedding tables."""

    def __init__(self, d=16, side=6, k=3):
        super().__init__()
        self.side, self.k = side, k
        self.query = nn.Linear(d, d)
        self.keys = nn.Parameter(torch.randn(2, side, d // 2))
        self.down, self.up = nn.Embedding(side * side, d), nn.Embedding(side * side, d)

    def forward(self, x):
        q = self.query(x).view(*x.shape[:-1], 2, -1)
        s = torch.einsum("...pd,pnd->...pn", q, self.keys)
        (sa, sb), (ia, ib) = (t.unbind(-2) for t in s.topk(self.k, -1))
        all_s = (sa.unsqueeze(-1) + sb.unsqueeze(-2)).flatten(-2)
        all_i = (ia.unsqueeze(-1) * self.side + ib.unsqueeze(-2)).flatten(-2)
        best, pos = all_s.topk(self.k, -1)
        ids = all_i.gather(-1, pos)
        h = F.gelu(torch.einsum("...d,...kd->...k", x, self.down(ids))) * best.softmax(-1)
        return torch.einsum("...k,...kd->...d", h, self.up(ids))


@case(flat(16), experts=36, expect="either", moe=None)
def strange_product_keys():
    return ProductKeys()


class LastWins(nn.Module):
    """A bug kept on purpose: duplicates in the index lose, since ``y[i] += v`` does not accumulate."""

    def __init__(self, d=16, n=2):
        super().__init__()
        self.router = nn.Linear(d, n)
        self.experts = nn.ModuleList([two(nn.Linear(d, 24), nn.Linear(24, d)) for _ in range(n)])

    def forward(self, x):
        a, b = self.router(x).argmax(-1), self.router(-x).argmin(-1)
        ids = torch.stack([a, b], 1)
        y = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            tok = (ids == e).nonzero()[:, 0]
            y[tok] += f(x[tok])
        return y


@case(flat(16), experts=2, expect="either", moe=1)
def strange_duplicates_lose():
    return LastWins()


class NeverCalled(Top2):
    """Experts 2 and 3 exist but a wrong modulo keeps everything on 0 and 1."""

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])
        w, idx = self.router(h).softmax(-1).topk(2)
        idx = idx % 2
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            t, s = torch.where(idx == i)
            if len(t):
                out.index_add_(0, t, expert(h[t]) * w[t, s, None])
        return out.view_as(x)


@case(seq(16), experts=4, expect="either", moe=1)
def strange_half_of_the_experts_unreachable():
    return NeverCalled(lambda i: two(nn.Linear(16, 24), nn.Linear(24, 16)))

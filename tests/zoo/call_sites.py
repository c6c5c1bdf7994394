"""How a MoE is called and what it keeps: counters, keywords, two calls, tied weights, padding masks."""

import torch
from torch import nn

from tests.zoo.case import case, made_by, seq
from tests.zoo.surroundings import MoE


class Counting(MoE):
    """Counts tokens per expert in a buffer at every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.zeros(4, dtype=torch.long))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        h = x.view(-1, x.shape[-1])
        _, w, idx = self.route(h)
        self.tokens_per_expert += torch.bincount(idx.flatten(), minlength=self.n)
        self.calls.add_(1)
        return self.apply_experts(h, w, idx).view_as(x)


@case(seq(20), experts=4, check_state=("tokens_per_expert", "calls"))
def around_counters():
    return Counting()


class Wrapped(nn.Module):
    """The MoE is called with keyword arguments only, and with some it ignores."""

    class Inner(MoE):
        def forward(self, *, hidden, scale=1.0, mask=None, **unused):
            h = hidden.reshape(-1, hidden.shape[-1])
            _, w, idx = self.route(h)
            y = self.apply_experts(h, w, idx).view_as(hidden) * scale
            return y if mask is None else y * mask.unsqueeze(-1)

    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(20), self.Inner()

    def forward(self, x, mask=None):
        return x + self.moe(hidden=self.norm(x), scale=0.5, mask=mask, layer_idx=3)


@case(
    made_by(lambda s, g: ((torch.randn(*s, 20, generator=g),), {"mask": (torch.rand(*s, generator=g) > 0.3).float()})),
    experts=4,
)
def around_keyword_call():
    return Wrapped()


class Twice(nn.Module):
    """ALBERT-like: one MoE module, used by two layers of the forward."""

    def __init__(self):
        super().__init__()
        self.moe = MoE()
        self.norms = nn.ModuleList([nn.LayerNorm(20), nn.LayerNorm(20)])

    def forward(self, x):
        for norm in self.norms:
            x = x + self.moe(norm(x))
        return x


@case(seq(20), experts=4, moe=2)
def around_module_used_twice():
    return Twice()


class TiedExperts(MoE):
    """Experts 0 and 3 are the same module; 1 and 2 share W_out."""

    def __init__(self):
        super().__init__()
        self.experts[3] = self.experts[0]
        self.experts[2].w2.weight = self.experts[1].w2.weight


@case(seq(20), experts=4)
def around_tied_experts():
    return TiedExperts()


class TiedAcrossLayers(nn.Module):
    """Both layers own a router of their own and use the same list of experts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = MoE(), MoE()
        self.b.experts = self.a.experts

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) * 4))


@case(seq(20), experts=4, moe=2)
def around_experts_shared_by_layers():
    return TiedAcrossLayers()


class DropoutExperts(MoE):
    """Dropout modules everywhere, silent in eval."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 28), nn.GELU(), nn.Dropout(0.3), nn.Linear(28, 20), nn.Dropout(0.2))
            for _ in range(4)
        )


@case(seq(20), experts=4)
def around_dropout_in_eval():
    return DropoutExperts()


class EmptySafe(MoE):
    """Early return for nothing to do, a padding mask that empties tokens, an in-place residual."""

    def forward(self, x, padding=None):
        if x.numel() == 0:
            return x
        h = x.reshape(-1, x.shape[-1])
        keep = torch.ones(len(h), dtype=torch.bool) if padding is None else ~padding.flatten()
        out = h.clone()
        _, w, idx = self.route(h[keep])
        out[keep] += self.apply_experts(h[keep], w, idx)
        return out.view_as(x)


@case(seq(20), experts=4)
def around_early_return():
    return EmptySafe()


@case(made_by(lambda s, g: ((torch.randn(*s, 20, generator=g), torch.rand(*s, generator=g) > 0.6), {})), experts=4)
def around_padding_mask():
    return EmptySafe()


class NoGradInside(MoE):
    """Decorated forward, hidden state scaled by a config constant, a .detach() on the way."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x.detach() * 0.5) * 2


@case(seq(20), experts=4)
def around_no_grad_forward():
    return NoGradInside()

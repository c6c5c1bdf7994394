"""From a ``Program`` to a seeded ``nn.Module`` in eval mode and calls for it.

Shape legend: T tokens, E experts, K chosen per token, H hidden.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tests.property import experts, forms, outside, routers
from tests.property.capacity import Capacity
from tests.property.configs import make_config
from tests.property.spec import Program
from tests.property.surroundings import NORMS, at_least_float32, softcap

OUTSIDE = {**outside.KINDS, "capacity": Capacity}
SHAPES = [(2, 7), (1, 1), (3, 5), (1, 19), (4, 2), (1, 64), (1, 0)]
"""(batch, length) of the calls; the first is the example that optimize is given."""
GAIN = 1e5
"""A float outside ``forward``: a whole number there may be a bound on tokens, and verification runs more than that."""


class RMSNorm(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(hidden))

    def forward(self, x):
        x32 = at_least_float32(x)
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def own_norm(kind: str, hidden: int) -> nn.Module:
    return RMSNorm(hidden) if kind == "rms" else nn.LayerNorm(hidden)


class Dense(nn.Module):
    """A shared expert of a shape of its own."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Norm, router, experts, shared expert, scale, residual, aux outputs."""

    def __init__(self, p: Program):
        super().__init__()
        self.p, a = p, p.around
        if a.norm:
            self.norm = NORMS[a.norm](p.hidden) if a.norm in NORMS else own_norm(a.norm, p.hidden)
        if p.config:
            self.config = make_config(p)
        self.router = routers.Route(p, self.config if p.config else None)
        self.experts = experts.KINDS[p.layout.kind](p)
        if a.shared == "twin":
            self.shared = experts.FFN(p)
        elif a.shared:
            self.shared = Dense(p.hidden, p.inner + 3)
        if a.shared == "gated":
            self.shared_gate = nn.Linear(p.hidden, 1, bias=False)

    def forward(self, hidden_states, *given):
        a = self.p.around
        h = self.norm(hidden_states) if a.norm else hidden_states
        x = h.reshape(-1, h.shape[-1]) if a.flatten else h
        # half of the blocks that read a configuration do so in their own code, not in a router module's
        route = self.router.forward if self.p.config and self.p.seed % 2 == 0 else self.router
        ids, weights, logits = route(x, *given)
        y = self.mixture(x, ids, weights)
        if a.out_scale != 1.0:
            y = y * a.out_scale
        if a.shared:
            s = self.shared(x)
            y = y + (torch.sigmoid(self.shared_gate(x)) * s if a.shared == "gated" else s)
        y = y.reshape(h.shape)
        if a.softcap:
            y = softcap(y, a.softcap)
        if a.residual:
            y = hidden_states + y
        if a.near_one:
            gain = hidden_states[..., :1]
            y = y + (gain - gain * a.near_one) * GAIN
        return self.outputs(y, ids, logits)

    def mixture(self, x, ids, weights):
        p = self.p
        if ids is not None and p.form in forms.SPARSE:
            return forms.SPARSE[p.form](self.experts, x, ids, weights, p.experts, p.weight_on)
        if ids is not None:
            weights = torch.zeros(*ids.shape[:-1], p.experts, dtype=weights.dtype).scatter(-1, ids, weights)
        return forms.DENSE[p.form](self.experts, x, weights, p.experts, p.weight_on)

    def outputs(self, y, ids, logits):
        if not self.p.around.aux:
            return y
        if logits is None:
            return y, torch.bincount(ids.reshape(-1), minlength=self.p.experts)
        if self.p.around.aux == "tuple":
            return y, logits
        load = F.one_hot(logits.argmax(-1), self.p.experts).float().flatten(0, -2).sum(0)
        return {"hidden_states": y, "load": load, "router_logits": logits}


class Masked(Block):
    """Forward has an optional argument: rows whose mask is zero are set to zero."""

    def forward(self, hidden_states, mask=None):
        if mask is not None:
            hidden_states = hidden_states * mask.unsqueeze(-1).to(hidden_states.dtype)
        return super().forward(hidden_states)


class Layers(nn.Module):
    """Several blocks, each added to the stream after a norm."""

    def __init__(self, p: Program):
        super().__init__()
        self.blocks = nn.ModuleList([Block(p) for _ in range(p.around.layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(p.hidden) for _ in range(p.around.layers)])

    def forward(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


def build(p: Program) -> nn.Module:
    """The model: the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(p.seed)
        p = replace(p, seed=p.seed % 2)  # which is all that the modules ask of it: see GAIN
        if p.outside:
            model: nn.Module = OUTSIDE[p.outside](p)
        else:
            model = Layers(p) if p.around.layers > 1 else Masked(p) if p.around.mask else Block(p)
    return model.to(getattr(torch, p.dtype)).eval()


def inputs(p: Program, call: int) -> tuple[torch.Tensor, ...]:
    """Positional arguments of the given call; call 0 is the example."""
    grid = SHAPES[call % len(SHAPES)]
    grid = grid if p.around.rank == 3 else (grid[0] * grid[1],)
    generator = torch.Generator().manual_seed(1000 * p.seed + call)
    dtype = getattr(torch, p.dtype)
    x = (torch.randn(*grid, p.hidden, generator=generator) * (1.0 + call % 3)).to(dtype)
    return x, *others(p, grid, generator, call == 0)


def others(p: Program, grid: tuple[int, ...], generator: torch.Generator, first: bool) -> tuple[torch.Tensor, ...]:
    """The arguments after the hidden states; ``first`` for the example."""
    dtype = getattr(torch, p.dtype)
    if p.around.mask == "given":
        return ((torch.rand(grid, generator=generator) > 0.3 * (not first)).to(dtype),)
    if p.router.kind == "given" and not p.outside:
        ids = torch.rand(*grid, p.experts, generator=generator).argsort(-1)[..., : p.top_k].contiguous()
        return ids, torch.rand(*grid, p.top_k, generator=generator).add(0.1).to(dtype)
    if p.router.kind == "hash" and not p.outside:
        size = len(routers.VOCABULARY)
        if first:  # no compiler can make up token ids; so the example's reach every expert
            return ((torch.arange(math.prod(grid)) + p.seed).remainder(size).view(grid),)
        return (torch.randint(size, grid, generator=generator),)
    return ()

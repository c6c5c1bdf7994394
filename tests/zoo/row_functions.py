"""Experts that are some function of a row and no two-matrix MLP: norms inside, third layers, adapters, odd endings."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq

D, HID, N = 16, 24, 8


class Routed(nn.Module):
    """Top-2 of N, a loop over the experts that somebody chose."""

    def __init__(self, make, d=D, n=N):
        super().__init__()
        self.router = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(n))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(2, dim=-1)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            total.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return total.view_as(x)


class NormInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, HID), nn.LayerNorm(HID), nn.Linear(HID, D)
        nn.init.normal_(self.norm.weight, 1, 0.3)
        nn.init.normal_(self.norm.bias, 0, 0.3)

    def forward(self, x):
        return self.down(F.gelu(self.norm(self.up(x))))


@case(seq(D), experts=N)
def row_norm_inside():
    return Routed(NormInside)


@case(seq(D), experts=N)
def row_three_layers():
    return Routed(lambda: nn.Sequential(nn.Linear(D, HID), nn.SiLU(), nn.Linear(HID, 12), nn.SiLU(), nn.Linear(12, D)))


@case(seq(D), experts=N)
def row_prelu():
    """PReLU with a slope for each neuron of each expert."""

    def make():
        act = nn.PReLU(HID)
        nn.init.uniform_(act.weight, 0.05, 0.6)
        return nn.Sequential(nn.Linear(D, HID), act, nn.Linear(HID, D))

    return Routed(make)


class Sine(nn.Module):
    """A SIREN layer: sin(w0 (W x + b))."""

    def __init__(self, i, o, w0=3.0):
        super().__init__()
        self.linear, self.w0 = nn.Linear(i, o), w0

    def forward(self, x):
        return torch.sin(self.w0 * self.linear(x))


@case(seq(D), experts=N)
def row_sine():
    return Routed(lambda: nn.Sequential(Sine(D, HID), Sine(HID, HID, 1.0), nn.Linear(HID, D)))


@case(flat(D), experts=N)
def row_softmax_at_the_end():
    return Routed(lambda: nn.Sequential(nn.Linear(D, HID), nn.ReLU(), nn.Linear(HID, D), nn.Softmax(dim=-1)))


class Scaled(nn.Module):
    """Layer scale: a learned vector on what the expert returns."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, HID), nn.LayerNorm(HID), nn.ReLU(), nn.Linear(HID, D))
        self.gamma = nn.Parameter(torch.rand(D) + 0.2)

    def forward(self, x):
        return self.gamma * self.body(x)


@case(seq(D), experts=N)
def row_layer_scale():
    return Routed(Scaled)


class Adapted(nn.Module):
    """A frozen linear and a low-rank update, scaled by alpha / rank."""

    def __init__(self, i, o, rank=3, alpha=6.0):
        super().__init__()
        self.base = nn.Linear(i, o, bias=False)
        self.lora_a, self.lora_b = nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x)) * self.scale


class AdaptedGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = Adapted(D, HID), Adapted(D, HID), Adapted(HID, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@case(seq(D), experts=N)
def row_adapters():
    return Routed(AdaptedGLU)


class Bank(nn.Module):
    """Stacked weights with a norm between them, expert e taken as slice e; top-1 with a sigmoid gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(N, D) * 0.3)
        self.w1, self.b1 = nn.Parameter(torch.randn(N, D, HID) * 0.3), nn.Parameter(torch.randn(N, HID) * 0.3)
        self.gamma = nn.Parameter(torch.rand(N, HID) + 0.3)
        self.w2 = nn.Parameter(torch.randn(N, HID, D) * 0.3)

    def expert(self, e, x):
        h = x @ self.w1[e] + self.b1[e]
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gamma[e]
        return F.relu(h) @ self.w2[e]

    def forward(self, x):
        rows = x.flatten(0, -2)
        score, pick = (rows @ self.gate.t()).sigmoid().max(-1)
        out = torch.zeros_like(rows)
        for e in range(N):
            at = (pick == e).nonzero().squeeze(-1)
            out[at] = self.expert(e, rows[at]) * score[at].unsqueeze(-1)
        return out.reshape(x.shape)


@case(seq(D), experts=N)
def row_stacked_bank_with_norm():
    return Bank()


class Highway(nn.Module):
    """Pre-norm written by hand, and a gate between the expert's result and its own input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)
        self.inner, self.carry = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        h = self.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
        t = torch.sigmoid(self.carry(h))
        return t * torch.tanh(self.inner(h)) + (1 - t) * x


@case(seq(D), experts=N)
def row_highway_with_norm():
    return Routed(Highway)


class Maxout(nn.Module):
    def __init__(self, pieces=3):
        super().__init__()
        self.first, self.second, self.pieces = nn.Linear(D, HID * pieces), nn.Linear(HID, D), pieces

    def forward(self, x):
        return self.second(self.first(x).view(len(x), HID, self.pieces).amax(-1))


@case(flat(D), experts=N)
def row_maxout():
    return Routed(Maxout)


@case(flat(D), experts=N)
def row_batch_norm_in_eval():
    """Running statistics are buffers of each expert."""

    def make():
        norm = nn.BatchNorm1d(HID)
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.5, 2)
        return nn.Sequential(nn.Linear(D, HID), norm, nn.ReLU(), nn.Linear(HID, D))

    return Routed(make)


@case(flat(D), experts=N)
def row_group_norm():
    return Routed(lambda: nn.Sequential(nn.Linear(D, HID), nn.GroupNorm(4, HID), nn.ReLU(), nn.Linear(HID, D)))


class HalfShared(nn.Module):
    """Some neurons of every expert are rows of one matrix that all share; the rest are its own."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.own, self.norm = nn.Parameter(torch.randn(HID - 10, D) * 0.3), nn.LayerNorm(HID)
        self.down = nn.Linear(HID, D)

    def forward(self, x):
        weight = torch.cat([self.shared[:10], self.own])
        return self.down(torch.relu(self.norm(x @ weight.t())))


@case(seq(D), experts=N)
def row_joined_slices():
    shared = nn.Parameter(torch.randn(20, D) * 0.3)
    return Routed(lambda: HalfShared(shared))


class Basis(nn.Module):
    """Radial basis functions of each feature, then one matrix over all of them."""

    def __init__(self, count=4):
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, count))
        self.mix, self.skip = nn.Linear(D * count, D), nn.Linear(D, D)

    def forward(self, x):
        bumps = torch.exp(-((x.unsqueeze(-1) - self.centres) ** 2))
        return self.mix(bumps.flatten(1)) + self.skip(F.silu(x))


@case(flat(D), experts=N)
def row_radial_basis():
    return Routed(Basis)


class Sigma(nn.Module):
    """The routing weight multiplies the activated row, before a second matmul that has no bias."""

    def __init__(self):
        super().__init__()
        self.select = nn.Linear(D, N, bias=False)
        self.keys, self.values = nn.Parameter(torch.randn(N, D, HID) * 0.3), nn.Parameter(torch.randn(N, HID, D) * 0.3)

    def forward(self, x):
        rows = x.reshape(-1, D)
        strength, which = self.select(rows).sigmoid().topk(2, -1)
        y = torch.zeros_like(rows)
        for e in range(N):
            token, slot = torch.where(which == e)
            hidden = torch.relu(rows[token] @ self.keys[e])
            y.index_add_(0, token, (hidden * strength[token, slot].unsqueeze(-1)) @ self.values[e])
        return y.view_as(x)


@case(seq(D), experts=N)
def row_weight_on_the_hidden_row():
    return Sigma()


class DenseMixture(nn.Module):
    """A dense mixture: all experts on all rows."""

    def __init__(self, make, n=4):
        super().__init__()
        self.gate, self.nets = nn.Linear(D, n), nn.ModuleList(make() for _ in range(n))

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        return torch.einsum("tnd,tn->td", torch.stack([net(x) for net in self.nets], 1), shares)


@case(flat(D), experts=4, expect="declined", reason="three matmuls.*would not pay")
def row_dense_mixture_of_three_layers():
    return DenseMixture(
        lambda: nn.Sequential(nn.Linear(D, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8))
    )


class OneNormed(nn.Module):
    """A feed-forward network with a norm inside, alone: no mixture, and nothing to do."""

    def __init__(self):
        super().__init__()
        self.net = NormInside()

    def forward(self, x):
        return x + self.net(x)


@case(flat(D), experts=1, expect="either", moe=0)
def row_dense_network_with_norm():
    return OneNormed()


@case(seq(D, torch.bfloat16), experts=N)
def row_norm_inside_bfloat16():
    return Routed(NormInside).to(torch.bfloat16)


class Temperature(nn.Module):
    """A number made in Python, and a square root of the width."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, HID), nn.LayerNorm(HID), nn.Linear(HID, D)

    def forward(self, x):
        return self.down(self.norm(self.up(x)).mul(1 / math.sqrt(HID)).softmax(-1)).clamp(-2, 2)


@case(seq(D), experts=N)
def row_softmax_in_the_middle():
    return Routed(Temperature)

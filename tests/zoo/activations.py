"""One dispatch loop, every activation: modules, functions, and formulas written out by hand."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat


class GLUExperts(nn.Module):
    """A list of (gate, up, down) experts; ``act`` works on the gate half."""

    def __init__(self, act, d=24, f=32, n=4, k=2, combine=None):
        super().__init__()
        self.act, self.k, self.n = act, k, n
        self.combine = combine or (lambda g, u: act(g) * u)
        self.score = nn.Linear(d, n, bias=False)
        self.gates = nn.ModuleList(nn.Linear(d, f, bias=False) for _ in range(n))
        self.ups = nn.ModuleList(nn.Linear(d, f, bias=False) for _ in range(n))
        self.downs = nn.ModuleList(nn.Linear(f, d, bias=False) for _ in range(n))

    def run_one(self, i, h):
        return self.downs[i](self.combine(self.gates[i](h), self.ups[i](h)))

    def forward(self, h):
        prob, pick = self.score(h).softmax(dim=1).topk(self.k)
        total = torch.zeros_like(h)
        for i in range(self.n):
            row, col = (pick == i).nonzero(as_tuple=True)
            if row.shape[0] > 0:
                total.index_add_(0, row, self.run_one(i, h[row]) * prob[row, col, None])
        return total


class PlainExperts(GLUExperts):
    def run_one(self, i, h):
        return self.downs[i](self.act(self.gates[i](h)))

    def __init__(self, act, **sizes):
        super().__init__(act, **sizes)
        del self.ups


@case(flat(24), experts=4)
def act_silu_by_hand():
    return GLUExperts(lambda x: x * torch.sigmoid(x))


@case(flat(24), experts=4)
def act_silu_divided():
    return GLUExperts(lambda x: x / (1 + torch.exp(-x)))


@case(flat(24), experts=4)
def act_gelu_erf():
    return GLUExperts(F.gelu)


@case(flat(24), experts=4)
def act_gelu_erf_by_hand():
    return PlainExperts(lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))))


@case(flat(24), experts=4)
def act_gelu_tanh():
    return GLUExperts(nn.GELU(approximate="tanh"))


@case(flat(24), experts=4)
def act_gelu_tanh_by_hand():
    c = math.sqrt(2.0 / math.pi)
    return PlainExperts(lambda x: 0.5 * x * (1.0 + torch.tanh(c * (x + 0.044715 * torch.pow(x, 3.0)))))


@case(flat(24), experts=4)
def act_gelu_tanh_by_hand_cubed():
    return GLUExperts(lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))))


@case(flat(24), experts=4)
def act_quick_gelu():
    return PlainExperts(lambda x: x * torch.sigmoid(1.702 * x))


@case(flat(24), experts=4)
def act_relu():
    return PlainExperts(torch.relu)


@case(flat(24), experts=4)
def act_relu_as_clamp():
    return PlainExperts(lambda x: x.clamp(min=0))


@case(flat(24), experts=4)
def act_relu_squared():
    return PlainExperts(lambda x: torch.relu(x).square())


@case(flat(24), experts=4)
def act_relu_squared_by_pow():
    return PlainExperts(lambda x: torch.pow(F.relu(x), 2))


@case(flat(24), experts=4)
def act_relu_squared_by_mul():
    return PlainExperts(lambda x: F.relu(x) * x)


@case(flat(24), experts=4)
def act_sigmoid_glu():
    return GLUExperts(torch.sigmoid)


@case(flat(24), experts=4)
def act_tanh():
    return PlainExperts(torch.tanh)


@case(flat(24), experts=4)
def act_bilinear():
    return GLUExperts(lambda x: x)


@case(flat(24), experts=4)
def act_up_times_gate():
    """The product is written the other way round."""
    return GLUExperts(F.silu, combine=lambda g, u: u * F.silu(g))


@case(flat(24), experts=4)
def act_clamped_gpt_oss():
    def glu(g, u):
        g, u = g.clamp(max=0.7), u.clamp(-0.7, 0.7)
        return (u + 1) * (g * torch.sigmoid(1.702 * g))

    return GLUExperts(None, combine=glu)


@case(flat(24), experts=4)
def act_clamped_after():
    return GLUExperts(None, combine=lambda g, u: F.silu(g).clamp(max=0.4) * u.clamp(min=-0.5, max=0.5))


@case(flat(24), experts=4, expect="either")
def act_softcapped_gate():
    return GLUExperts(None, combine=lambda g, u: F.gelu(0.5 * torch.tanh(g / 0.5)) * u, n=4)


@case(flat(24), experts=4)
def act_leaky_relu():
    return PlainExperts(nn.LeakyReLU(0.1))


@case(flat(24), experts=4)
def act_elu():
    return PlainExperts(nn.ELU())


@case(flat(24), experts=4)
def act_mish():
    return PlainExperts(nn.Mish())


@case(flat(24), experts=4)
def act_softplus():
    return PlainExperts(F.softplus)


@case(flat(24), experts=4, expect="either")
def act_sine():
    """In no list: still grouped, or declined with the reason."""
    return PlainExperts(torch.sin)


@case(flat(24), experts=4, expect="either")
def act_prelu_per_expert():
    class PReLUExperts(PlainExperts):
        def __init__(self):
            super().__init__(None)
            self.slopes = nn.Parameter(torch.rand(4))

        def run_one(self, i, h):
            return self.downs[i](F.prelu(self.gates[i](h), self.slopes[i : i + 1]))

    return PReLUExperts()


@case(flat(16), experts=512)
def act_512_experts():
    return GLUExperts(F.silu, d=16, f=8, n=512, k=4)


@case(flat(16), experts=2)
def act_two_experts():
    return GLUExperts(F.silu, d=16, f=8, n=2, k=1)

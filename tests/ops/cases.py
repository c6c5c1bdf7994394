"""Random expert blocks over every axis of ``ExpertsSpec``, and a second definition to hold the first against.

``naive`` is written from the equations in ``moeopt.ir.specs`` alone: one token, one slot at a time, and
activations from their formulas. It shares no code with ``moeopt.ops``.
"""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec
from moeopt.ops import ExpertWeights, ListExpertWeights, StackedExpertWeights

H, I = 6, 5
HALVES = (None, "float32", "bfloat16", "float16")


@dataclass
class Case:
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    bank: ExpertWeights
    spec: ExpertsSpec

    @property
    def args(self):
        return self.x, self.ids, self.weights, self.bank, self.spec


def make(spec, T=7, E=4, K=2, dtype=torch.float64, stacked=True, biases=True, seed=0, strange_ids=False, wide=0):
    """A block of random weights; ``wide`` adds columns to W_out's output when identity ids do not forbid it."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def weight(layout, out, into):
        # every second column of a larger tensor: weights are often views
        w = randn(E, out, 2 * into)[:, :, ::2] if seed % 2 else randn(E, out, into)
        return w / math.sqrt(into) if layout == "oi" else (w / math.sqrt(into)).transpose(1, 2).contiguous()

    out_width = H if spec.out_of_range == "identity" else H + wide
    rows = {"plain": [I], "separate": [I, I]}.get(spec.rows, [2 * I])
    w_in = [weight(spec.w_in_layout, r, H) for r in rows]
    w_out = weight(spec.w_out_layout, out_width, I)
    b_in = [randn(E, r) for r in rows] if biases else None
    b_out = randn(E, out_width) if biases else None
    norm = 1 + randn(E, out_width) / 4 if spec.out_norm_eps is not None and seed % 3 else None
    if stacked:
        bank = StackedExpertWeights(w_in, w_out, b_in, b_out, norm)
    else:
        listed = [None if t is None else list(t.unbind(0)) for t in (b_out, norm)]
        bank = ListExpertWeights(
            [list(w.unbind(0)) for w in w_in], list(w_out), b_in and [list(b) for b in b_in], *listed
        )
    low, high = (-2, E + 3) if strange_ids else (0, E)
    ids = torch.randint(low, high, (T, K), generator=g)
    return Case(randn(T, H), ids, torch.rand(T, K, generator=g, dtype=torch.float64).to(dtype), bank, spec)


@st.composite
def specs(draw, dtypes=False):
    activation = draw(st.sampled_from(ACTIVATIONS))
    limit = st.sampled_from((None, None, 0.25, 1.0))
    low = st.sampled_from((None, None, -0.5))
    dtype = st.sampled_from(HALVES if dtypes else (None,))
    return ExpertsSpec(
        rows=draw(st.sampled_from(("gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"))),
        w_in_layout=draw(st.sampled_from(("oi", "io"))),
        w_out_layout=draw(st.sampled_from(("oi", "io"))),
        activation=activation,
        alpha={"swish": 1.702, "softcap": 2.0, "leaky_relu": 0.1, "elu": 1.5}.get(activation),
        gate_min=draw(low),
        gate_max=draw(limit),
        up_min=draw(low),
        up_max=draw(limit),
        act_min=draw(low),
        act_max=draw(limit),
        up_offset=draw(st.sampled_from((0.0, 1.0))),
        out_norm_eps=draw(st.sampled_from((None, None, 1e-2))),
        weight_on=draw(st.sampled_from(("output", "input"))),
        out_of_range=draw(st.sampled_from(("nothing", "identity"))),
        combine=draw(st.sampled_from(("expert", "slot"))),
        compute_dtype=draw(dtype),
        act_dtype=draw(dtype),
        accum_dtype=draw(dtype),
        out_dtype=draw(dtype),
    )


@st.composite
def cases(draw, dtypes=False, max_tokens=9):
    spec = draw(specs(dtypes))
    E = draw(st.sampled_from((1, 2, 5)))
    return make(
        spec,
        T=draw(st.integers(0, max_tokens)),
        E=E,
        K=draw(st.integers(1, E + 1)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))) if dtypes else torch.float64,
        stacked=draw(st.booleans()),
        biases=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
        strange_ids=draw(st.booleans()),
        wide=draw(st.sampled_from((0, 3))),
    )


def coarsest_eps(case):
    """The largest eps of all the dtypes that a value passes on its way."""
    spec = case.spec
    names = [n for n in (spec.compute_dtype, spec.act_dtype, spec.accum_dtype, spec.out_dtype) if n]
    return max(torch.finfo(d).eps for d in [case.x.dtype, case.weights.dtype, *(getattr(torch, n) for n in names)])


FORMULAS = {
    "silu": lambda z, a: z / (1 + torch.exp(-z)),
    "gelu": lambda z, a: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z, a: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z, a: torch.where(z > 0, z, 0.0 * z),
    "relu2": lambda z, a: torch.where(z > 0, z * z, 0.0 * z),
    "sigmoid": lambda z, a: 1 / (1 + torch.exp(-z)),
    "tanh": lambda z, a: 1 - 2 / (torch.exp(2 * z) + 1),
    "swish": lambda z, a: z / (1 + torch.exp(-a * z)),
    "softcap": lambda z, a: a * (1 - 2 / (torch.exp(2 * z / a) + 1)),
    "identity": lambda z, a: z,
    "leaky_relu": lambda z, a: torch.where(z > 0, z, a * z),
    "elu": lambda z, a: torch.where(z > 0, z, a * (torch.exp(z) - 1)),
    "mish": lambda z, a: z * torch.tanh(torch.log(1 + torch.exp(z))),
    "softplus": lambda z, a: torch.log(1 + torch.exp(z)),
}


def naive(case):
    """The result in float64, whatever dtypes the case names; and the size of the terms that it sums."""
    spec, bank = case.spec, case.bank
    width = bank.w_out(0).shape[0 if spec.w_out_layout == "oi" else 1]
    y = torch.zeros(case.x.shape[0], width, dtype=torch.float64)
    size = torch.zeros_like(y)
    for t, x in enumerate(case.x.double()):
        for e, w in zip(case.ids[t].tolist(), case.weights[t].double(), strict=True):
            if 0 <= e < bank.num_experts:
                term = (
                    _naive_expert(x * w, bank, e, spec)
                    if spec.weight_on == "input"
                    else (_naive_expert(x, bank, e, spec) * w)
                )
            elif e >= bank.num_experts and spec.out_of_range == "identity":
                term = x * w
            else:
                continue
            y[t] += term
            size[t] += term.abs()
    return y, size


def _naive_expert(r, bank, e, spec):
    hidden = []
    for w, b in zip(bank.w_in(e), bank.b_in(e), strict=True):
        w = w.double() if spec.w_in_layout == "oi" else w.double().T
        hidden.append(w @ r + (0 if b is None else b.double()))
    h = torch.cat(hidden)
    n = len(h) // 2
    g, u = {
        "gate|up": (h[:n], h[n:]),
        "separate": (h[:n], h[n:]),
        "up|gate": (h[n:], h[:n]),
        "interleaved": (h[0::2], h[1::2]),
        "interleaved_up": (h[1::2], h[0::2]),
        "plain": (h, None),
    }[spec.rows]
    inf = math.inf

    def between(z, low, high):
        return z.clamp(-inf if low is None else low, inf if high is None else high)

    a = FORMULAS[spec.activation](between(g, spec.gate_min, spec.gate_max), spec.alpha)
    a = between(a, spec.act_min, spec.act_max)
    if u is not None:
        a = a * (between(u, spec.up_min, spec.up_max) + spec.up_offset)
    w = bank.w_out(e).double()
    o = (w if spec.w_out_layout == "oi" else w.T) @ a
    if bank.b_out(e) is not None:
        o = o + bank.b_out(e).double()
    if spec.out_norm_eps is not None:
        o = o / torch.sqrt((o * o).mean() + spec.out_norm_eps)
        if bank.norm(e) is not None:
            o = o * bank.norm(e).double()
    return o

"""Expert functions and the ways their weights lie.

Shape legend: N rows, E experts, H hidden, I inner. A weight is "oi" (out, in) or "io" (in, out).
``Bank.one(e)`` gives an expert's weights, ``Bank.all()`` the same of all experts with a leading E.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.property.spec import Program

LIMIT = 0.6
"""Of clamps: small, so that random values reach it."""


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def gelu_by_hand(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_erf_by_hand(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "quick_gelu": quick_gelu,
    "silu by hand": lambda x: x * torch.sigmoid(x),
    "silu by division": lambda x: x / (1 + torch.exp(-x)),
    "gelu_tanh by hand": gelu_by_hand,
    "gelu by hand": gelu_erf_by_hand,
    "relu by clamp": lambda x: x.clamp(min=0),
    "relu by maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "relu2 by pow": lambda x: torch.pow(torch.relu(x), 2),
    "softcap": lambda x: 1.5 * torch.tanh(x / 1.5),
    "mish by hand": lambda x: x * torch.tanh(F.softplus(x)),
}


def halves(h: Tensor, rows: str, inner: int) -> tuple[Tensor, Tensor]:
    """Gate and up, from one packed product."""
    if rows == "interleaved":
        return h[..., ::2], h[..., 1::2]
    if rows == "interleaved_up":
        return h[..., 1::2], h[..., ::2]
    if rows == "gate|up":
        gate, up = h.chunk(2, dim=-1)
        return gate, up
    return h[..., inner:], h[..., :inner]


def inside(p: Program, products: list[Tensor]) -> Tensor:
    """Between the two matmuls."""
    f, act = p.expert, ACTIVATIONS[p.expert.activation]
    if not f.gated:
        gate = products[0].clamp(max=LIMIT) if f.clamp in ("gate", "both") else products[0]
        a = act(gate)
        return a.clamp(-LIMIT, LIMIT) if f.clamp == "after" else a
    gate, up = products if p.layout.rows == "separate" else halves(products[0], p.layout.rows, p.inner)
    if f.clamp in ("gate", "both"):
        gate = gate.clamp(min=None, max=LIMIT)
    if f.clamp == "both":
        up = up.clamp(min=-LIMIT, max=LIMIT)
    a = act(gate)
    if f.clamp == "after":
        a = torch.clamp(a, -LIMIT, LIMIT)
    return a * (up + f.up_offset) if f.up_offset else a * up


class FFN(nn.Module):
    """One expert as a module of Linears."""

    def __init__(self, p: Program):
        super().__init__()
        self.p, f = p, p.expert
        if not f.gated:
            self.fc1 = nn.Linear(p.hidden, p.inner, bias=f.bias_in)
        elif p.layout.rows == "separate":
            self.gate_proj = nn.Linear(p.hidden, p.inner, bias=f.bias_in)
            self.up_proj = nn.Linear(p.hidden, p.inner, bias=f.bias_in)
        else:
            self.wi = nn.Linear(p.hidden, 2 * p.inner, bias=f.bias_in)
        self.down = nn.Linear(p.inner, p.hidden, bias=f.bias_out)

    def forward(self, x):
        first = [m for name, m in self.named_children() if name != "down"]
        return self.down(inside(self.p, [m(x) for m in first]))


class ListBank(nn.ModuleList):
    def __init__(self, p: Program):
        super().__init__([FFN(p) for _ in range(p.experts)])

    def run(self, e: int, x: Tensor) -> Tensor:
        return self[e](x)


class DictBank(nn.ModuleDict):
    def __init__(self, p: Program):
        super().__init__({f"expert_{e}": FFN(p) for e in range(p.experts)})

    def run(self, e: int, x: Tensor) -> Tensor:
        return self[f"expert_{e}"](x)


class TensorBank(nn.Module):
    """Experts that are parameters: a ParameterList of E, one stack, or one flat 2-D matrix."""

    def __init__(self, p: Program):
        super().__init__()
        self.p, f = p, p.expert
        gates = 2 if f.gated and p.layout.rows == "separate" else 1
        width = p.inner * (2 if f.gated and gates == 1 else 1)
        self.ins = gates
        for i in range(gates):
            self.keep(f"w{i + 1}", width, p.hidden, p.layout.w_in)
            self.keep_bias(f"b{i + 1}", width if f.bias_in else 0)
        self.keep("w_out", p.hidden, p.inner, p.layout.w_out)
        self.keep_bias("b_out", p.hidden if f.bias_out else 0)

    def keep(self, name: str, out: int, in_: int, layout: str) -> None:
        shape = (out, in_) if layout == "oi" else (in_, out)
        stack = torch.randn(self.p.experts, *shape) * in_**-0.5
        if self.p.layout.kind == "parameter_list":
            setattr(self, name, nn.ParameterList([nn.Parameter(w.clone()) for w in stack]))
        else:
            setattr(self, name, nn.Parameter(stack.flatten(0, 1) if self.p.layout.kind == "flat" else stack))

    def keep_bias(self, name: str, width: int) -> None:
        if not width:
            setattr(self, name, None)
            return
        stack = torch.randn(self.p.experts, width) * 0.3
        if self.p.layout.kind == "parameter_list":
            setattr(self, name, nn.ParameterList([nn.Parameter(b.clone()) for b in stack]))
        else:
            setattr(self, name, nn.Parameter(stack))

    def weight(self, name: str, e: int | None) -> Tensor | None:
        """Expert e's, or all with a leading E."""
        held = getattr(self, name)
        if held is None:
            return None
        if self.p.layout.kind == "flat" and held.dim() == 2 and name.startswith("w"):
            if e is not None and self.p.seed % 2:
                size = held.shape[0] // self.p.experts
                return held[e * size : (e + 1) * size]
            held = held.view(self.p.experts, -1, held.shape[-1])
        return held if e is None else held[e]

    def run(self, e: int, x: Tensor) -> Tensor:
        """Expert e on rows (N, H), or on one row (H,)."""
        products = [
            self.times(x, self.weight(f"w{i + 1}", e), self.weight(f"b{i + 1}", e), self.p.layout.w_in)
            for i in range(self.ins)
        ]
        a = inside(self.p, products)
        return self.times(a, self.weight("w_out", e), self.weight("b_out", e), self.p.layout.w_out)

    def times(self, x: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
        how = self.p.layout.matmul
        if how == "linear" and layout == "oi":
            return F.linear(x, w, b)
        if how == "einsum":
            y = torch.einsum("...i,oi->...o" if layout == "oi" else "...i,io->...o", x, w)
        else:
            y = x @ (w.t() if layout == "oi" else w)
        return y if b is None else y + b

    def run_all(self, x_EN: Tensor, ids: Tensor | None = None) -> Tensor:
        """(E, N, H) or, with ids (E,), each its picked expert: batched matmuls over the whole stack."""
        products = [self.batched(x_EN, f"w{i + 1}", f"b{i + 1}", self.p.layout.w_in, ids) for i in range(self.ins)]
        return self.batched(inside(self.p, products), "w_out", "b_out", self.p.layout.w_out, ids)

    def batched(self, x: Tensor, weight: str, bias: str, layout: str, ids: Tensor | None) -> Tensor:
        w, b = self.weight(weight, None), self.weight(bias, None)
        if ids is not None:
            w, b = w[ids], None if b is None else b[ids]
        if self.p.layout.matmul == "einsum":
            y = torch.einsum("eni,eoi->eno" if layout == "oi" else "eni,eio->eno", x, w)
        else:
            y = torch.bmm(x, w.transpose(1, 2) if layout == "oi" else w)
        return y if b is None else y + b.unsqueeze(1)


KINDS = {
    "list": ListBank,
    "dict": DictBank,
    "parameter_list": TensorBank,
    "stacked": TensorBank,
    "flat": TensorBank,
}

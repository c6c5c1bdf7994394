"""What happens between the two products, and its gradient: by formula where the spec is a common one, else by autograd.

Shape legend: M rows, I intermediate, O = 2I (gated) or I (plain).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import activate, apply_gate, split_rows

aten = torch.ops.aten

Pair = tuple[Tensor, ...]
"""Gates and ups, each (M, I), or what plain experts have in the place of both."""
Pull = Callable[[Tensor], Pair]
"""From the gradient of act(h), which it may overwrite, to that of h: (M, O), or gates' and ups' (M, I) apart, as W_in
is."""

_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "silu": aten.silu_backward.grad_input,
    "gelu": aten.gelu_backward.grad_input,
    "relu": lambda grad, g, grad_input: aten.threshold_backward.grad_input(grad, g, 0, grad_input=grad_input),
}
"""PyTorch's own derivatives, which it uses for these in a graph."""


def gated(h: Pair, spec: ExpertsSpec) -> tuple[Tensor, Pull]:
    """act(h), a tensor that nobody else has, and how a gradient goes through it; call it where none is recorded."""
    backward = _BACKWARD.get(spec.activation)
    limits = spec.gate_min, spec.gate_max, spec.up_min, spec.up_max, spec.act_min, spec.act_max
    act_dtype = getattr(torch, spec.act_dtype) if spec.act_dtype else h[0].dtype
    if backward is None or spec.up_offset or act_dtype is not h[0].dtype or any(limit is not None for limit in limits):
        return _by_autograd(h, spec)
    g = h[0]
    s = activate(g, spec.activation, spec.alpha)

    def pull(b: Tensor) -> Pair:
        whole, parts = _room(b, h, spec)
        if len(h) == 2:
            torch.mul(b, s, out=parts[1])
            b = b.mul_(h[1])
        backward(b, g, grad_input=parts[0])
        return whole

    return s * h[1] if len(h) == 2 else s, pull


def _by_autograd(h: Pair, spec: ExpertsSpec) -> tuple[Tensor, Pull]:
    leaves = [t.detach().requires_grad_() for t in h]
    with torch.enable_grad():
        a = apply_gate(tuple(leaves), spec)

    def pull(b: Tensor) -> Pair:
        whole, parts = _room(b, h, spec)
        for part, found in zip(parts, torch.autograd.grad(a, leaves, b), strict=True):
            part.copy_(found)
        return whole

    return a.detach().clone(), pull


def _room(b: Tensor, h: Pair, spec: ExpertsSpec) -> tuple[Pair, Pair]:
    """New memory for the gradient of h, and the parts of it that are those of gates and ups."""
    if len(h) == 1 or spec.rows == "separate":
        parts = tuple([b.new_empty(b.shape) for _ in h])
        return parts, parts
    whole = b.new_empty(b.shape[0], 2 * b.shape[1])
    return (whole,), split_rows(whole, spec)

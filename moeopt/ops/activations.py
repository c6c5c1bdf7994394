"""The elementwise middle of an expert: split, clamp, activate, multiply; one definition for every kernel.

Shape legend: M rows, O = 2I (gated) or I (plain), I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.activations import activation_of
from moeopt.ir.specs import ExpertsSpec


def activate(g: Tensor, name: str, alpha: float | None) -> Tensor:
    """``name`` of ``moeopt.ir.activations.ACTIVATION_TABLE`` on ``g``, in the dtype of ``g``; never in place.

    Raises:
        UsageError: no activation has that name, or alpha is missing.
    """
    entry = activation_of(name)
    return entry.torch(g, *entry.parameters(alpha))


def split_rows(h_MO: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """The gate and up halves of ``h_MO``, as views, in the order that ``spec.rows`` names."""
    if spec.rows == "interleaved":
        return h_MO[..., 0::2], h_MO[..., 1::2]
    if spec.rows == "interleaved_up":
        return h_MO[..., 1::2], h_MO[..., 0::2]
    first, second = h_MO.chunk(2, dim=-1)
    return (first, second) if spec.rows == "gate|up" else (second, first)


def apply_gate(h: Tensor | tuple[Tensor, ...], spec: ExpertsSpec) -> Tensor:
    """What happens between the two GEMMs.

    Args:
        h: the first GEMM's output (M, O) with its bias; or the pair (gate, up), each (M, I), when
            ``spec.rows == "separate"``; a tuple of one is taken as its tensor. Any strides.
        spec: the activation, clamps, offset and ``act_dtype``.

    Returns:
        (M, I) in the dtype of ``h`` (the compute dtype). Clamps, activation and product run in
        ``spec.act_dtype``, rounding after each operation as eager PyTorch does.
    """
    if isinstance(h, tuple) and len(h) == 1:
        h = h[0]
    if isinstance(h, tuple):
        g, u = h
    elif spec.gated:
        g, u = split_rows(h, spec)
    else:
        g, u = h, None
    compute = g.dtype
    if spec.act_dtype is not None:
        g = g.to(getattr(torch, spec.act_dtype))
    g = _clamp(g, spec.gate_min, spec.gate_max)
    a = _clamp(activate(g, spec.activation, spec.alpha), spec.act_min, spec.act_max)
    if u is not None:
        u = _clamp(u.to(a.dtype), spec.up_min, spec.up_max)
        if spec.up_offset:
            u = u + spec.up_offset
        a = a * u
    return a.to(compute)


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x if low is None and high is None else x.clamp(low, high)

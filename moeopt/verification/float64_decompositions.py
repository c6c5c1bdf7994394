"""Float64 stand-ins for the ops that refuse doubles, and for products of weights too large to be held twice.

Each takes the op's own arguments, floating ones in any dtype, and returns float64. They are written
to be read, not to be fast: they define what the op computes. Grouped weights are converted one group
at a time, so that a bank of E experts is never held twice.

Shape legend: M rows, G groups (experts), K contracted, N columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.experts import decode, unflatten
from moeopt.ops.quantized_experts import in_float64 as quantized_in_float64
from moeopt.ops.reference import experts_reference
from moeopt.ops.row_function import in_float64
from moeopt.value_types import PyObject

F64 = torch.float64
AT_ONCE = 1 << 22
"""Elements of a product's second operand that are widened at once: 32 MB in float64."""


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``aten::mm``; of a large ``b``, which may be all experts side by side, some columns are widened at a time."""
    if b.numel() <= AT_ONCE or not b.is_floating_point():
        return torch.mm(_in_float64(a), _in_float64(b))
    rows, out = a.to(F64), torch.empty(a.shape[0], b.shape[1], dtype=F64, device=a.device)
    step = max(1, AT_ONCE // b.shape[0])
    for n in range(0, b.shape[1], step):
        out[:, n : n + step] = rows @ b[:, n : n + step].to(F64)
    return out


def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """``aten::bmm``; of a large ``b``, which may be a stack of experts, some matrices are widened at a time."""
    if b.numel() <= AT_ONCE or not b.is_floating_point():
        return torch.bmm(_in_float64(a), _in_float64(b))
    step = max(1, AT_ONCE // (b.shape[1] * b.shape[2]))
    parts = zip(a.split(step), b.split(step), strict=True)
    return torch.cat([torch.bmm(rows.to(F64), part.to(F64)) for rows, part in parts])


def _in_float64(value: Tensor) -> Tensor:
    return value.to(F64) if value.is_floating_point() else value


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``aten::_grouped_mm``: 2d x 3d and 3d x 2d cut by ``offs`` (running ends), 2d x 2d cut K, 3d x 3d is bmm."""
    if offs is None:
        out = bmm(a, b)
        return out if bias is None else out + bias.to(F64).unsqueeze(1)
    ends = [int(end) for end in offs.tolist()]
    starts = [0, *ends[:-1]]
    groups = list(enumerate(zip(starts, ends, strict=True)))
    if a.dim() == 2 and b.dim() == 3:  # (M,K) x (G,K,N) -> (M,N)
        out = torch.zeros(a.shape[0], b.shape[2], dtype=F64, device=a.device)
        for g, (lo, hi) in groups:
            if hi > lo:
                out[lo:hi] = a[lo:hi].to(F64) @ b[g].to(F64)
                if bias is not None:
                    out[lo:hi] += bias[g].to(F64)
        return out
    if a.dim() == 3 and b.dim() == 2:  # (G,M,K) x (K,N) -> (M,N)
        out = torch.zeros(a.shape[1], b.shape[1], dtype=F64, device=a.device)
        for g, (lo, hi) in groups:
            out[:, lo:hi] = a[g].to(F64) @ b[:, lo:hi].to(F64)
        return out
    # (M,K) x (K,N) -> (G,M,N)
    return torch.stack([a[:, lo:hi].to(F64) @ b[lo:hi].to(F64) for _, (lo, hi) in groups])


def softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """``aten::_softmax``; ``half_to_float`` accepts half inputs only, and float64 holds both."""
    return torch._softmax(x.to(F64), dim, False)


def log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """``aten::_log_softmax``, as :func:`softmax`."""
    return torch._log_softmax(x.to(F64), dim, False)


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


def linear_pointwise(
    x: Tensor, w: Tensor, b: Tensor | None, attr: str = "none", scalars: PyObject = (), algorithm: PyObject = None
) -> Tensor:
    """``mkldnn::_linear_pointwise``: x W^T + b, then a pointwise function."""
    if w.is_mkldnn:
        w = w.to_dense()
    y = torch.nn.functional.linear(x.to(F64), w.to(F64), None if b is None else b.to(F64))
    if attr == "gelu" and algorithm == "tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    if attr not in _POINTWISE:
        raise NotImplementedError(f"mkldnn linear with a fused {attr!r} has no float64 stand-in")
    return _POINTWISE[attr](y)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """softmax(q k^T * scale + mask) v; (..., L, D) x (..., S, D), heads repeated when k has fewer. A query that sees no
    key gets zeros."""
    q, k, v = q.to(F64), k.to(F64), v.to(F64)
    if q.dim() == 4 and k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(F64)
    sees_nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(sees_nothing, 0.0) @ v


def flash_cpu(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):  # type: ignore[no-untyped-def]
    """``aten::_scaled_dot_product_flash_attention_for_cpu``; the second result is the log-sum-exp, unused here."""
    return attention(q, k, v, attn_mask, is_causal, scale), q.new_empty(0, dtype=F64)


def flash_cuda(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):  # type: ignore[no-untyped-def]
    """``aten::_scaled_dot_product_flash_attention`` (CUDA): the first of nine results is the output."""
    return (attention(q, k, v, None, is_causal, scale), *[None] * 8)


def efficient_cuda(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    """``aten::_scaled_dot_product_efficient_attention`` (CUDA): the first of four results is the output."""
    return (attention(q, k, v, attn_bias, is_causal, scale), None, None, None)


def experts(x, ids, weights, w_in, w_out, b_in, b_out, norm, spec):  # type: ignore[no-untyped-def]
    """``moeopt::experts``: its definition with every dtype float64; a weight is widened when it is used."""
    wide = _wide(spec)
    return experts_reference(x.to(F64), ids, weights.to(F64), unflatten((w_in, w_out, b_in, b_out, norm), wide), wide)


def quantized_experts(x, ids, weights, w_in, w_out, b_in, b_out, norm, spec, formats):  # type: ignore[no-untyped-def]
    """``moeopt::quantized_experts``: the definition on the exact products of codes and scales."""
    return quantized_in_float64(x, ids, weights, w_in, w_out, b_in, b_out, norm, _wide(spec), formats)


def _wide(spec: str) -> ExpertsSpec:
    """The spec with every dtype float64."""
    return dataclasses.replace(
        decode(spec), compute_dtype="float64", act_dtype=None, accum_dtype="float64", out_dtype="float64"
    )


STAND_INS: dict[str, Callable[..., Any]] = {
    "moeopt::experts": experts,
    "moeopt::quantized_experts": quantized_experts,
    "moeopt::row_function": in_float64,
    "aten::mm": mm,
    "aten::bmm": bmm,
    "aten::_grouped_mm": grouped_mm,
    "transformers::grouped_mm_fallback": grouped_mm,
    "aten::_softmax": softmax,
    "aten::_log_softmax": log_softmax,
    "mkldnn::_linear_pointwise": linear_pointwise,
    "aten::_scaled_dot_product_flash_attention_for_cpu": flash_cpu,
    "aten::_scaled_dot_product_flash_attention": flash_cuda,
    "aten::_scaled_dot_product_efficient_attention": efficient_cuda,
}
"""Op name -> stand-in."""

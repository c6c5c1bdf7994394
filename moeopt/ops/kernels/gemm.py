"""One expert's matrix product on a CPU: the same product has four spellings, and the obvious one is the slow one.

Shape legend: M rows of x, I in, O out.  y_MO = x_MI @ w_OI.t() + b_O

``choose_gemm`` holds what was measured (torch 2.13, MKL 2024.2, oneDNN 3.12, Xeon with AMX, 1 and 2 threads;
``benchmarks/gemm.py`` measures it anew). Milliseconds, 2 threads, W (1536, 2048), row-major:

    M                      1     2     4     8    16    32    64
    float32   F.linear  0.62  0.62  1.14  1.48  1.39  1.68  2.45
              mm(W,xT)  0.51  0.94  0.88  0.89  0.98  1.37  2.35
              oneDNN    0.57  0.78  0.77  0.91  1.09  1.72  2.18
    bfloat16  F.linear  0.61  0.54  0.57  0.53  0.55  0.76  1.17
              mm(W,xT)  0.52  0.36  0.34  0.33  0.36  0.58  0.69
              mv        0.31
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gemm = Literal["mv", "linear", "mm_t", "onednn"]

LARGE = 1 << 20
"""Elements (4 MB of float32) from which W streams from memory; a smaller W stays in cache, where F.linear is ahead."""


def choose_gemm(rows: int, dtype: torch.dtype, row_major: bool, elements: int) -> Gemm:
    """The fastest spelling for ``rows`` rows and a W (O, I) of ``elements``; ``row_major``: I is contiguous."""
    if dtype == torch.bfloat16:
        if row_major:
            return "mv" if rows == 1 else "mm_t"
        return "onednn" if rows <= 64 else "linear"
    if dtype == torch.float32 and row_major and 4 <= rows <= 48 and elements >= LARGE:
        return "mm_t"
    return "linear"


def linear(x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    """``F.linear``, spelled the fast way; any strides of ``w_OI``; the result may be a transposed view."""
    kind = choose_gemm(x_MI.shape[0], w_OI.dtype, w_OI.stride(1) == 1, w_OI.numel())
    if kind == "mm_t":
        x_IM = x_MI.t()
        return (torch.mm(w_OI, x_IM) if b_O is None else torch.addmm(b_O.unsqueeze(1), w_OI, x_IM)).t()
    if kind == "mv":
        x_I = x_MI[0]
        return (torch.mv(w_OI, x_I) if b_O is None else torch.addmv(b_O, w_OI, x_I)).unsqueeze(0)
    if kind == "onednn" and onednn_linear_works(w_OI.dtype):
        return torch.ops.mkldnn._linear_pointwise(x_MI, w_OI, b_O, "none", [], "")
    return F.linear(x_MI, w_OI, b_O)


def linear_into(y_MO: Tensor, x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> None:
    """:func:`linear`, written to the rows ``y_MO``."""
    kind = choose_gemm(x_MI.shape[0], w_OI.dtype, w_OI.stride(1) == 1, w_OI.numel())
    if kind == "mv" and b_O is None:
        torch.mv(w_OI, x_MI[0], out=y_MO[0])
    elif kind != "linear":
        y_MO.copy_(linear(x_MI, w_OI, b_O))
    elif b_O is None:
        torch.mm(x_MI, w_OI.t(), out=y_MO)
    else:
        torch.addmm(b_O, x_MI, w_OI.t(), out=y_MO)


@functools.cache
def onednn_linear_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's private linear exists in this torch and agrees with ``F.linear`` here, on both layouts."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    w_OI = torch.linspace(-1, 1, 24 * 40).reshape(24, 40).to(dtype)
    b_O = torch.linspace(-1, 1, 24).to(dtype)
    x_MI = torch.linspace(1, 2, 5 * 40).reshape(5, 40).to(dtype)
    for w, b in ((w_OI, b_O), (w_OI.t().contiguous().t(), None)):
        want = F.linear(x_MI.double(), w.double(), None if b is None else b.double())
        try:
            got = torch.ops.mkldnn._linear_pointwise(x_MI, w, b, "none", [], "")
        except (RuntimeError, TypeError):  # another schema, or no kernel for this dtype on this CPU
            return False
        # one rounding of the result plus 40 float32 roundings inside: 2 eps of the largest value covers both
        if got.dtype != dtype or (got - want).abs().max() > 2 * max(torch.finfo(dtype).eps, 4e-7) * want.abs().max():
            return False
    return True

"""GPTQ: each column's rounding error is made good by the columns that are not rounded yet.

    least over codes of   |X (W - W_q)^T|^2  =  sum over rows of W of   (w - w_q) H (w - w_q)^T,      H = X^T X

Columns are rounded in the order of H's diagonal, largest first: column k to the nearest code, and what that is off,
times row k of the upper Cholesky factor of H^-1, is taken from the columns that follow (Frantar et al., GPTQ,
arXiv:2210.17323, algorithm 1). Scales are searched before (``searched_scales``), weighted by the same diagonal, and
stay as they are, so that blocks lie where the format has them whatever the order is.

Shape legend: N out, K in, C columns of a turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.nearest_codes import meant, nearest_codes, stored_codes
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_weight import QuantizedWeight, scale_values

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: H of few rows has no inverse."""
TURN = 128
"""Columns whose errors are gathered before the rest of the matrix is changed by one product."""


def gptq(w_NK: Tensor, format: WeightFormat, hessian_KK: Tensor, name: str = "the weight") -> QuantizedWeight:
    """``w_NK`` in ``format``, rounded column by column so that the products with the data's rows stay near.

    Args:
        w_NK: (N out, K in), a floating dtype.
        format: a format with scales of :mod:`moeopt.ir.weight_format`.
        hessian_KK: (K, K): sum of x x^T over the rows x that the weight is multiplied with; float64 is kept.
        name: what messages call the weight.

    Raises:
        UsageError: as :func:`moeopt.ops.quantize`; H is not (K, K), holds NaN or infinity, or is no such sum.
    """
    K = w_NK.shape[-1]
    if hessian_KK.shape != (K, K) or not bool(torch.isfinite(hessian_KK).all()):
        raise UsageError(
            f"the Hessian of {name} is {tuple(hessian_KK.shape)}, or holds NaN or infinity; it must be ({K}, {K}) of "
            "finite numbers"
        )
    squares_K = hessian_KK.diagonal().double().clamp(min=0)
    start = quantize(w_NK, format, name, search=True, squares_K=squares_K)
    if format.is_float or not bool(squares_K.sum() > 0):
        return start
    with torch.no_grad():
        try:
            codes = _rounded(w_NK.detach().double(), start, hessian_KK.double(), squares_K)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch
            raise UsageError(
                f"the Hessian of {name} has eigenvalues far below 0; it must be a sum of x x^T over rows x"
            ) from None
    return QuantizedWeight(stored_codes(codes, format), start.scales, start.zeros, format, start.shape)


def _rounded(w_NK: Tensor, start: QuantizedWeight, hessian_KK: Tensor, squares_K: Tensor) -> Tensor:
    """The codes, as numbers, of ``w_NK`` with the scales and zero points of ``start``."""
    order = squares_K.argsort(descending=True, stable=True)
    back = order.argsort()
    upper = _factor(hessian_KK[order][:, order] / squares_K.mean())  # errors are shared out alike at any scale
    left, codes = w_NK[:, order], torch.empty_like(w_NK)
    N, K = w_NK.shape
    height, width = start.format.block[0] or N, start.format.block[1] or K
    assert start.scales is not None
    scales_BS = scale_values(start.scales, start.format, torch.float64)
    row_N = torch.arange(N, device=w_NK.device).div(height, rounding_mode="floor")
    column_K = order.div(width, rounding_mode="floor")
    for first in range(0, K, TURN):
        last = min(first + TURN, K)
        errors_NC = torch.empty(N, last - first, dtype=torch.float64, device=w_NK.device)
        for k in range(first, last):
            scale_N = scales_BS[row_N, column_K[k]]
            zero_N = None if start.zeros is None else start.zeros[row_N, column_K[k]].double()
            codes[:, k] = nearest_codes(left[:, k] / scale_N, start.format, zero_N, whole=True)
            error_N = (left[:, k] - scale_N * meant(codes[:, k], start.format, zero_N)) / upper[k, k]
            left[:, k + 1 : last] -= error_N[:, None] * upper[k, k + 1 : last]
            errors_NC[:, k - first] = error_N
        left[:, last:] -= errors_NC @ upper[first:last, last:]
    return codes[:, back]


def _factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H, whose diagonal has the mean 1, with ``DAMPING`` on it."""
    hessian_KK.diagonal().add_(DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian_KK))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper

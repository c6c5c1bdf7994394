"""Scales, and zero points, with which the rounded weights of a block are nearest to the floats.

    least over s, z of   sum over the block of   d_k (w_nk - s (q_nk - z))^2,     q = round(w / s + z)

The scale that gives the largest weight a code of its own wastes steps on the rest. Tried are scales from 0.6 to 1.05 of
it, of both signs where the codes of a symmetric format reach further on one side (4-bit integers: -8 to 7); the best is
then replaced by the least-squares scale of its codes, twice, wherever that is better. ``d_k`` is the mean square of the
k-th input, where that is known: then the sum is the error of the product, had inputs no correlations. Powers of two
(``e8m0``) are tried one step up and down. Nothing is ever worse than the scale that it began with.

Shape legend: as in :mod:`moeopt.ops.nearest_codes`; K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.nearest_codes import meant, nearest_codes, rounded_up, wanted_scales, wanted_zeros
from moeopt.ops.quantized_weight import scale_values

FACTORS = tuple(0.6 + 0.0375 * i for i in range(13))
"""Of the scale that gives the largest weight a code of its own."""
FLOOR = 1e-3
"""Of the mean square of all inputs, added to each: one that no row of the data reached is still a weight."""

Found = tuple[Tensor, "Tensor | None"]
"""Scales (B, S) in the format's dtype, and zero points."""


def importance(squares_K: Tensor | None, w_NK: Tensor, name: str) -> Tensor:
    """(K,) float64 above 0: how much the error of each column of ``w_NK`` counts; 1 where nothing is known.

    Raises:
        UsageError: ``squares_K`` is not (K,), or holds NaN, infinity or negative numbers.
    """
    K = w_NK.shape[1]
    if squares_K is None:
        return torch.ones(K, dtype=torch.float64, device=w_NK.device)
    squares = squares_K.to(w_NK.device, torch.float64)
    if squares.shape != (K,) or not bool((torch.isfinite(squares) & (squares >= 0)).all()):
        raise UsageError(
            f"the mean squares of the inputs of {name} are {tuple(squares.shape)}, or hold NaN, infinity or negative "
            f"numbers; they must be ({K},) numbers of 0 or more"
        )
    mean = squares.mean()
    return squares / mean + FLOOR if mean > 0 else torch.ones_like(squares)


def searched(
    w_BRSC: Tensor, format: WeightFormat, scales_BS: Tensor, zeros_BS: Tensor | None, importance_SC: Tensor
) -> Found:
    """Scales and zero points of least weighted error for blocks in float64; ``scales_BS`` and ``zeros_BS`` are those
    to begin with."""
    best = (scales_BS.clone(), None if zeros_BS is None else zeros_BS.clone())
    least = _error(w_BRSC, format, best, importance_SC)[0]
    wanted = wanted_scales(w_BRSC, format)
    for scales in _candidates(wanted, scales_BS, format):
        found: Found = scales, None
        if zeros_BS is not None:
            found = scales, wanted_zeros(w_BRSC, scale_values(scales, format, torch.float64), format).to(zeros_BS.dtype)
        least = _keep_better(best, least, found, _error(w_BRSC, format, found, importance_SC)[0])
    for _ in range(0 if format.scale == "e8m0" else 2):
        values = _error(w_BRSC, format, best, importance_SC)[1]
        over = (importance_SC * values * values).sum((1, 3))
        scale = ((importance_SC * w_BRSC * values).sum((1, 3)) / over).to(format.scale_dtype)
        fitted = torch.where((over > 0) & (scale != 0) & torch.isfinite(scale), scale, best[0]), best[1]
        least = _keep_better(best, least, fitted, _error(w_BRSC, format, fitted, importance_SC)[0])
    return best


def _candidates(wanted_BS: Tensor, scales_BS: Tensor, format: WeightFormat) -> list[Tensor]:
    if format.scale == "e8m0":
        return [(scales_BS.int() + step).clamp(0, 254).to(torch.uint8) for step in (-1, 1)]
    found = [rounded_up(wanted_BS * factor, format) for factor in FACTORS]
    uneven = format.symmetric and format.codes in ("uint4", "nf4")  # their negative codes mean other sizes
    return [*found, *(-one for one in found)] if uneven else found


def _error(w_BRSC: Tensor, format: WeightFormat, at: Found, importance_SC: Tensor) -> tuple[Tensor, Tensor]:
    """The error of each block, and what its nearest codes mean before the scale."""
    scale = scale_values(at[0], format, torch.float64)[:, None, :, None]
    zero = None if at[1] is None else at[1].double()[:, None, :, None]
    values = meant(nearest_codes(w_BRSC / scale, format, zero, whole=True), format, zero)
    gap = w_BRSC - scale * values
    return (importance_SC * gap * gap).sum((1, 3)), values


def _keep_better(best: Found, least: Tensor, other: Found, error: Tensor) -> Tensor:
    """Write to ``best`` what ``other`` does better; NaN is never better. The errors that remain."""
    better = error < least
    for mine, its in zip(best, other, strict=True):
        if mine is not None and its is not None:
            mine.copy_(torch.where(better, its, mine))
    return torch.where(better, error, least)

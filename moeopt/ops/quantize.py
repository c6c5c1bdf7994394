"""Float weights to codes and scales, each rounded to nearest, a few rows of blocks at a time.

    scale = max |w| of the block / largest code        code = round(w / scale), ties to even
    asymmetric: scale = (max - min) / 15 or 255, with 0 between them; zero = round(-min / scale)
    e8m0: scale = 2^(floor(log2 max |w|) - 2), and codes beyond 6 saturate (OCP Microscaling, version 1.0, section 6.3)

A scale is rounded up to its dtype, so that the largest weight of a block has a code. A block of zeros has scale 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.nearest_codes import nearest_codes, rounded_up, stored_codes, wanted_scales, wanted_zeros
from moeopt.ops.quantized_weight import TILE, QuantizedWeight, scale_values
from moeopt.ops.searched_scales import importance, searched


def quantize(
    w_NK: Tensor, format: WeightFormat, name: str = "the weight", search: bool = False, squares_K: Tensor | None = None
) -> QuantizedWeight:
    """``w_NK`` in ``format``, rounded to nearest.

    Args:
        w_NK: (N out, K in), a floating dtype; never converted whole.
        format: a format of :mod:`moeopt.ir.weight_format`.
        name: what messages call the weight.
        search: choose the scales (and zero points) of least squared error, see :mod:`moeopt.ops.searched_scales`; else
            they are those of the largest weight.
        squares_K: of a search, (K,) floats: the mean square of what each input is multiplied with; None: all alike.

    Raises:
        UsageError: the weight is not 2-D and floating, or holds NaN or infinity, or numbers beyond the scale's dtype;
            ``squares_K`` is not (K,) or holds NaN, infinity or negative numbers.
    """
    if w_NK.dim() != 2 or not w_NK.is_floating_point() or w_NK.dtype.itemsize == 1:
        raise UsageError(f"{name} is {w_NK.dtype} {tuple(w_NK.shape)}; quantize takes an (out, in) float weight")
    N, K = w_NK.shape
    if format.is_float:
        kept = w_NK.detach().to(format.code_dtype)
        if not bool(torch.isfinite(kept).all()):
            raise UsageError(f"{name} holds NaN, infinity or numbers beyond {format.name}")
        return QuantizedWeight(kept, None, None, format, (N, K))
    importance_K = importance(squares_K, w_NK, name) if search else None
    codes = torch.empty(format.code_shape((N, K)), dtype=format.code_dtype, device=w_NK.device)
    scales = torch.empty(format.scale_shape((N, K)), dtype=format.scale_dtype, device=w_NK.device)
    zeros = None if format.symmetric else torch.empty_like(scales, dtype=format.code_dtype)
    height = format.block[0] or N
    step = max(1, TILE // max(K * height, 1)) * height
    with torch.no_grad():
        for first in range(0, N, step):
            tile = w_NK[first : first + step].double()
            if not bool(torch.isfinite(tile).all()):
                raise UsageError(f"{name} holds NaN or infinity, which no code means; it cannot be quantised")
            rows = slice(first, first + len(tile))
            blocks = slice(first // height, -(-(first + len(tile)) // height))
            held = codes[rows], scales[blocks], None if zeros is None else zeros[blocks]
            _quantize_tile(tile, format, *held, name, importance_K)
    return QuantizedWeight(codes, scales, zeros, format, (N, K))


def _quantize_tile(
    w_RK: Tensor, format: WeightFormat, codes: Tensor, scales: Tensor, zeros: Tensor | None, name: str,
    importance_K: Tensor | None,
) -> None:  # fmt: skip
    """Whole rows of blocks, in float64, into codes, scales and zero points; searched where there is importance."""
    (R, K), (height, width) = w_RK.shape, (format.block[0] or len(w_RK), format.block[1] or w_RK.shape[1])
    down, across = -(-R // height), -(-K // width)
    padded = torch.nn.functional.pad(w_RK, (0, across * width - K, 0, down * height - R))
    w_BRSC = padded.view(down, height, across, width)  # block row, row, block column, column
    wanted = wanted_scales(w_BRSC, format)
    scales.copy_(rounded_up(wanted, format))
    if not bool(torch.isfinite(scale_values(scales, format, torch.float64)).all()):
        raise UsageError(f"{name} holds {w_RK.abs().max().item():.3g}, for which a {format.scale} scale is too small")
    if zeros is not None:
        zeros.copy_(wanted_zeros(w_BRSC, scale_values(scales, format, torch.float64), format).to(zeros.dtype))
    if importance_K is not None:
        importance_SC = torch.nn.functional.pad(importance_K, (0, across * width - K)).view(across, width)
        found = searched(w_BRSC, format, scales, zeros, importance_SC)
        scales.copy_(found[0])
        if zeros is not None and found[1] is not None:
            zeros.copy_(found[1])
    scale = scale_values(scales, format, torch.float64)
    zero = None if zeros is None else zeros.double()[:, None, :, None]
    code = nearest_codes(w_BRSC / scale[:, None, :, None], format, zero, importance_K is not None)
    codes.copy_(stored_codes(code.reshape(down * height, across * width)[:R, :K], format))

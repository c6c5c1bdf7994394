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
from moeopt.ir.weight_format import NIBBLES, WeightFormat
from moeopt.ops.quantized_weight import TILE, QuantizedWeight, scale_values

_TOP = {"int8": 127.0, "uint8": 127.0, "uint4": 7.0, "e4m3": 448.0, "e2m1": 6.0, "nf4": 1.0}
"""The largest code that a positive weight gets, less a symmetric zero point."""


def quantize(w_NK: Tensor, format: WeightFormat, name: str = "the weight") -> QuantizedWeight:
    """``w_NK`` in ``format``, rounded to nearest.

    Args:
        w_NK: (N out, K in), a floating dtype; never converted whole.
        format: a format of :mod:`moeopt.ir.weight_format`.
        name: what messages call the weight.

    Raises:
        UsageError: the weight is not 2-D and floating, or holds NaN or infinity, or numbers beyond the scale's dtype.
    """
    if w_NK.dim() != 2 or not w_NK.is_floating_point() or w_NK.dtype.itemsize == 1:
        raise UsageError(f"{name} is {w_NK.dtype} {tuple(w_NK.shape)}; quantize takes an (out, in) float weight")
    N, K = w_NK.shape
    if format.is_float:
        kept = w_NK.detach().to(format.code_dtype)
        if not bool(torch.isfinite(kept).all()):
            raise UsageError(f"{name} holds NaN, infinity or numbers beyond {format.name}")
        return QuantizedWeight(kept, None, None, format, (N, K))
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
            _quantize_tile(tile, format, codes[rows], scales[blocks], None if zeros is None else zeros[blocks], name)
    return QuantizedWeight(codes, scales, zeros, format, (N, K))


def _quantize_tile(
    w_RK: Tensor, format: WeightFormat, codes: Tensor, scales: Tensor, zeros: Tensor | None, name: str
) -> None:
    """Whole rows of blocks, in float64, into their codes, scales and zero points."""
    (R, K), (height, width) = w_RK.shape, (format.block[0] or len(w_RK), format.block[1] or w_RK.shape[1])
    down, across = -(-R // height), -(-K // width)
    padded = torch.nn.functional.pad(w_RK, (0, across * width - K, 0, down * height - R))
    w_BRSC = padded.view(down, height, across, width)  # block row, row, block column, column
    if zeros is None:
        wanted = w_BRSC.abs().amax((1, 3)) / _TOP[format.codes]
    else:
        low, high = w_BRSC.amin((1, 3)).clamp(max=0), w_BRSC.amax((1, 3)).clamp(min=0)
        wanted = (high - low) / (15 if format.packed else 255)
    scales.copy_(_rounded_up(wanted, format))
    scale = scale_values(scales, format, torch.float64)
    if not bool(torch.isfinite(scale).all()):
        raise UsageError(f"{name} holds {w_RK.abs().max().item():.3g}, for which a {format.scale} scale is too small")
    code = w_BRSC / scale[:, None, :, None]
    if zeros is not None:
        least = -128 if format.codes == "int8" else 0
        most = 15 if format.packed else least + 255
        zero = (least - low / scale).round().clamp(least, most)
        zeros.copy_(zero.to(zeros.dtype))
        code = (code + zero[:, None, :, None]).round().clamp(least, most)
    elif format.codes in ("int8", "uint8", "uint4"):
        top = _TOP[format.codes]
        code = code.round().clamp(-top, top) + format.zero
    code = code.reshape(down * height, across * width)[:R, :K]
    if format.codes in ("e2m1", "nf4"):
        code = _nearest(code, format.codes)
    elif format.codes == "e4m3":
        code = code.clamp(-448, 448)
    codes.copy_(_packed(code.to(torch.uint8), format) if format.packed else code.to(codes.dtype))


def _rounded_up(wanted: Tensor, format: WeightFormat) -> Tensor:
    """Scales in their dtype, none less than ``wanted``; 1 for blocks of zeros."""
    if format.scale == "e8m0":
        largest = wanted * _TOP[format.codes]
        _, exponent = torch.frexp(largest)  # largest = m * 2^exponent, 0.5 <= m < 1
        top = 2 if format.codes == "e2m1" else 0  # the exponent of the largest code
        return torch.where(wanted == 0, 127, (exponent - 1 - top + 127).clamp(0, 254)).to(torch.uint8)
    scale = wanted.to(format.scale_dtype)
    if format.scale_dtype != torch.float64:
        above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
        scale = torch.where(scale.double() < wanted, above, scale)
    return torch.where(wanted == 0, torch.ones_like(scale), scale)


def _nearest(values: Tensor, codes: str) -> Tensor:
    """The code whose value is nearest; ties go to the even code of a float, else to the lower value."""
    table = torch.tensor(NIBBLES[codes], dtype=torch.float64, device=values.device)
    if codes == "nf4":
        return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2)
    middle = (table[1:8] + table[:7]) / 2
    size = values.abs()
    below, above = torch.bucketize(size, middle), torch.bucketize(size, middle, right=True)  # differ at ties
    code = torch.where(below % 2 == 0, below, above)
    return code + 8 * (torch.signbit(values) & (code > 0))


def _packed(code_RK: Tensor, format: WeightFormat) -> Tensor:
    """Two codes a byte; the last byte of an odd row is filled with a weight of zero."""
    if code_RK.shape[1] % 2:
        code_RK = torch.nn.functional.pad(code_RK, (0, 1), value=7 if format.codes == "nf4" else format.zero)
    first, second = code_RK[:, 0::2], code_RK[:, 1::2]
    if format.packing == "high nibble first":
        first, second = second, first
    return first | (second << 4)

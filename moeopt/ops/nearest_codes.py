"""Blocks of weights and a scale for each: the nearest codes, what they mean, and how they are stored.

Shape legend: B rows of blocks, R rows of a block, S columns of blocks, C columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.weight_format import NIBBLES, WeightFormat

TOP = {"int8": 127.0, "uint8": 127.0, "uint4": 7.0, "e4m3": 448.0, "e2m1": 6.0, "nf4": 1.0, "fp4": 1.0}
"""The largest code that a positive weight gets, less a symmetric zero point."""


def wanted_scales(w_BRSC: Tensor, format: WeightFormat) -> Tensor:
    """(B, S): with which the largest weight of each block, or its least and largest, have the last codes."""
    if format.symmetric:
        return w_BRSC.abs().amax((1, 3)) / TOP[format.codes]
    low, high = _ends(w_BRSC)
    return (high - low) / (15 if format.packed else 255)


def wanted_zeros(w_BRSC: Tensor, scale_BS: Tensor, format: WeightFormat) -> Tensor:
    """(B, S) whole numbers: the zero points with which the least weight of each block has the first code."""
    least, most = _range(format)
    return (least - _ends(w_BRSC)[0] / scale_BS).round().clamp(least, most)


def _ends(w_BRSC: Tensor) -> tuple[Tensor, Tensor]:
    return w_BRSC.amin((1, 3)).clamp(max=0), w_BRSC.amax((1, 3)).clamp(min=0)


def _range(format: WeightFormat) -> tuple[int, int]:
    """The first and the last code of a format with zero points."""
    least = -128 if format.codes == "int8" else 0
    return least, 15 if format.packed else least + 255


def nearest_codes(scaled: Tensor, format: WeightFormat, zero: Tensor | None = None, whole: bool = False) -> Tensor:
    """The codes nearest to weights that were divided by their scales, as numbers that :func:`stored_codes` takes.

    Args:
        zero: the zero points, in a shape that broadcasts; None where the format is symmetric.
        whole: give symmetric 4-bit integers the code of -8 too, which has no positive twin.
    """
    if zero is not None:
        return (scaled + zero).round().clamp(*_range(format))
    if format.codes in ("int8", "uint8", "uint4"):
        top = TOP[format.codes]
        least = -top - 1 if whole and format.packed else -top
        return scaled.round().clamp(least, top) + format.zero
    if format.codes == "e4m3":
        return scaled.clamp(-448, 448)
    return _nearest(scaled, format.codes)


def meant(codes: Tensor, format: WeightFormat, zero: Tensor | None = None) -> Tensor:
    """What the codes of :func:`nearest_codes` mean, before the scale, in the dtype of ``codes`` or float64."""
    if format.codes == "e4m3":
        return codes.to(torch.float8_e4m3fn).to(codes.dtype)
    if format.codes in ("e2m1", "nf4", "fp4"):
        table = torch.tensor(NIBBLES[format.codes], dtype=torch.float64, device=codes.device)
        return table[codes.long()]
    return codes - (format.zero if zero is None else zero)


def stored_codes(codes_RK: Tensor, format: WeightFormat) -> Tensor:
    """The codes of :func:`nearest_codes` in the format's dtype, two in a byte where it packs them."""
    if format.packed:
        return _packed(codes_RK.to(torch.uint8), format)
    return codes_RK.to(format.code_dtype)


def rounded_up(wanted: Tensor, format: WeightFormat) -> Tensor:
    """Scales in their dtype, none less than ``wanted``; 1 for blocks of zeros."""
    if format.scale == "e8m0":
        largest = wanted * TOP[format.codes]
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
    if codes != "e2m1":
        order = table.argsort(stable=True)  # of two codes that mean 0 the first one
        order = order[torch.cat((torch.ones(1, dtype=torch.bool, device=order.device), table[order].diff() > 0))]
        rising = table[order]
        return order[torch.bucketize(values.contiguous(), (rising[1:] + rising[:-1]) / 2)]
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

"""Codes as other tools pack them, laid out as :class:`WeightFormat` has them: (N, K / 2) bytes, low nibble first.

Shape legend: N out, K in, G groups along K, P numbers in an int32 (8 of 4 bits, 4 of 8 bits).

    compressed-tensors   int32 (N, K / P), the first number in the lowest bits: the bytes are right as they lie
    GPTQ                 int32 (K / P, N), the first number in the lowest bits: the bytes are transposed
    AWQ ("gemm")         int32 (K, N / 8), numbers 0 2 4 6 1 3 5 7 of eight columns, lowest bits first

What must be moved is moved in as many bytes as it has; no code ever becomes a float here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_TILE = 1 << 22


def rows_of_int32(packed: Tensor, columns: int, bits: int) -> Tensor:
    """compressed-tensors: a view of the bytes, (N, bytes of ``columns`` codes)."""
    return packed.contiguous().view(torch.uint8)[:, : -(-columns * bits // 8)]


def columns_of_int32(packed: Tensor) -> Tensor:
    """GPTQ: (K / P, N) int32 to (N, bytes of K codes)."""
    down, N = packed.shape
    return packed.contiguous().view(torch.uint8).view(down, N, 4).permute(1, 0, 2).reshape(N, down * 4)


def awq_codes(packed: Tensor) -> Tensor:
    """AWQ: (K, N / 8) int32 to (N, K / 2) bytes, a few columns at a time."""
    K, across = packed.shape
    out = torch.empty(across * 8, K // 2, dtype=torch.uint8)
    step = max(1, _TILE // max(8 * K, 1))
    for first in range(0, across, step):
        nibbles = awq_numbers(packed[:, first : first + step])  # (K, columns)
        pairs = nibbles[0::2] | (nibbles[1::2] << 4)
        out[8 * first : 8 * first + pairs.shape[1]] = pairs.t()
    return out


def awq_numbers(packed: Tensor) -> Tensor:
    """AWQ: (R, C) int32 to (R, 8 C) bytes, one a number, in the order of the columns."""
    numbers = numbers_of_int32(packed, 4).unflatten(1, (-1, 8))
    where = torch.empty(8, dtype=torch.long)
    where[list(_AWQ)] = torch.arange(8)
    columns: Tensor = numbers.index_select(2, where)
    return columns.flatten(1)


def numbers_of_int32(packed: Tensor, bits: int) -> Tensor:
    """(R, C) int32 to (R, C P) bytes, one a number, lowest bits first."""
    bytes_ = packed.clone(memory_format=torch.contiguous_format).view(
        torch.uint8
    )  # contiguous() keeps what one row has
    if bits == 8:
        return bytes_
    return torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)

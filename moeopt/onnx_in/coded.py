"""Constants that a file holds as codes and scales, and the floats that these stand for.

    DequantizeLinear(x, scale, zero)     y = (x - zero) * scale, a scale for the tensor, an index of an axis or a block
    MatMulNBits(a, B, scales, zeros)     a @ w.T, w (N, K) of 2 to 8 bits, a scale for each block of a row

Both become a plain constant of floats here, whose codes are remembered: a region is read, verified and rewritten as one
of floats, and its experts get the codes back (``published.file_codes``).

Shape legend: S the shape of the floats; a block has a size for each axis, and scales have the shape ceil(S / block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeopt.codes_in_files import room_for


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """One constant of floats.

    Attributes:
        node: the name of the node that makes it of codes.
        codes: reads the codes, of shape S and one an element; anew at each call, so that nobody holds them unpacked.
        dtype: of the codes. bits: of a code in the file.
        scales: of shape ceil(S / block), in the dtype of the file.
        zeros: of the same shape and of the codes' dtype; None where every code's zero point is 0.
        block: how many elements of each axis share a scale.
        floats: of shape S and contiguous: what the codes stand for, rounded once to the dtype of the file.
    """

    node: str
    codes: Callable[[], Tensor]
    dtype: torch.dtype
    bits: int
    scales: Tensor
    zeros: Tensor | None
    block: tuple[int, ...]
    floats: Tensor


class CodedWeights:
    """The weights of a module that its file holds as codes; copies of the module have the same."""

    def __init__(self, found: Sequence[CodedTensor] = ()) -> None:
        self.found = tuple(found)

    def __deepcopy__(self, memo: dict[int, object]) -> CodedWeights:
        return self


def coded_weights(module: nn.Module) -> tuple[CodedTensor, ...]:
    """The weights of a module of a file that are codes there; () of any other."""
    held = module.__dict__.get("coded")
    return held.found if isinstance(held, CodedWeights) else ()


def coded(
    node: str, codes: Callable[[], Tensor], bits: int, scales: Tensor, zeros: Tensor | None, block: tuple[int, ...],
    dtype: torch.dtype,
) -> CodedTensor:  # fmt: skip
    """Dequantise a constant, one index of its first axis at a time where it has three or more."""
    held = codes()
    floats = room_for(held.shape, dtype)
    step = 1 if held.dim() > 2 else max(len(held), 1) if held.dim() else 1
    for first in range(0, len(held) if held.dim() else 1, step):
        rows = slice(first, first + step) if held.dim() else ...
        part = held[rows].to(torch.float32)
        at = _block_rows(first, len(part), block) if held.dim() else None
        if zeros is not None:
            part = part - spread(_taken(zeros, at), block, part.shape).to(torch.float32)
        floats[rows] = (part * spread(_taken(scales, at), block, part.shape).to(torch.float32)).to(dtype)
    return CodedTensor(node, codes, held.dtype, bits, scales, zeros, block, floats)


def _block_rows(first: int, count: int, block: tuple[int, ...]) -> Tensor:
    """The block of the first axis that each of ``count`` indices from ``first`` on lies in."""
    return torch.arange(first, first + count) // block[0]


def _taken(scales: Tensor, at: Tensor | None) -> Tensor:
    return scales if at is None else scales.index_select(0, at)


def spread(scales: Tensor, block: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """Scales whose first axis has its full length, as what broadcasts to ``shape``."""
    for axis in range(1, len(shape)):
        if 1 < block[axis] < shape[axis]:
            scales = scales.repeat_interleave(block[axis], axis).narrow(axis, 0, shape[axis])
    return scales


def unpacked(blob: Tensor, bits: int, columns: int) -> Tensor:
    """Codes that lie in bytes (N, bytes), the first in the low bits, as one a byte: (N, columns) of uint8."""
    if bits == 8:
        return blob[:, :columns]
    parts = [(blob >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1)[:, :columns]

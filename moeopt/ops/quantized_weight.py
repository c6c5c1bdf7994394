"""A weight as codes and scales, and the float weight that it means, a few rows at a time.

Shape legend: N out, K in, R rows of a tile, S scales of a row, C columns that share a scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moeopt.errors import UsageError
from moeopt.ir.weight_format import NIBBLES, WeightFormat

TILE = 1 << 18
"""Weights that are taken apart at once: their floats stay in a cache, and nothing is ever expanded whole."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One (N, K) weight in a format; N is out and K is in, whatever layout a spec has.

    Args:
        codes: (N, K), or (N, ceil(K / 2)) bytes where two codes share one; any strides.
        scales: one for each block, (blocks of N, blocks of K); None where the format is a float dtype.
        zeros: the zero points, one a block, of the codes' dtype and not packed; None where the format is symmetric.
        format: what they mean.
        shape: (N, K).

    Raises:
        UsageError: shapes or dtypes that do not fit the format; the message names them.
    """

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    format: WeightFormat
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        wanted = [("codes", self.codes, self.format.code_dtype, self.format.code_shape(self.shape))]
        blocks = self.format.scale_shape(self.shape)
        for name, tensor, dtype, absent in (
            ("scales", self.scales, self.format.scale_dtype, self.format.is_float),
            ("zeros", self.zeros, self.format.code_dtype, self.format.symmetric),
        ):
            if (tensor is None) != absent:
                raise UsageError(
                    f"a weight in {self.format} has {'no ' if absent else ''}{name}, and "
                    f"{'some' if absent else 'none'} were given"
                )
            if tensor is not None:
                wanted.append((name, tensor, dtype, blocks))
        for name, tensor, dtype, shape in wanted:
            if tensor.dtype != dtype or tensor.shape != shape:
                raise UsageError(
                    f"a weight of {self.shape[0]} x {self.shape[1]} in {self.format} has {name} of {dtype} "
                    f"{tuple(shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
                )

    def check(self, name: str) -> None:
        """Refuse scales that give no finite float32, and zero points that no code is.

        Raises:
            UsageError: a scale is NaN or infinite, or its block's largest code is beyond float32, or a zero point is
                beyond the codes; ``name`` is told.
        """
        if self.scales is None or not self.scales.numel():
            return
        if self.zeros is not None and (beyond := zeros_beyond(self.zeros, self.format)):
            raise UsageError(f"{name}: {beyond}; the checkpoint is damaged or of another format: quantise it again")
        ends = torch.stack(torch.aminmax(self.scales))[None]  # of many scales, so that nothing of their size is made
        largest = scale_values(ends, self.format, torch.float64).abs().max().item()
        if not math.isfinite(largest):
            scales = scale_values(self.scales, self.format, torch.float64)
            row, column = (~torch.isfinite(scales)).nonzero()[0].tolist()
            raise UsageError(
                f"{name}: the scale of block ({row}, {column}) is {scales[row, column].item()}, so its weights are "
                "no numbers; the checkpoint is damaged or was quantised from broken weights: quantise it again"
            )
        if largest * self.format.largest > torch.finfo(torch.float32).max:
            raise UsageError(f"{name}: a scale of {largest:.3g} puts weights beyond float32; quantise it again")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (N, K) float weight: the exact product in float64, else that of float32, rounded once to ``dtype``.

        No more than a few rows are held in float32 beside the result.
        """
        if self.format.is_float:
            return self.codes.to(dtype)
        N, K = self.shape
        out = torch.empty(N, K, dtype=dtype, device=self.codes.device)
        step = max(1, TILE // max(K, 1))
        for first in range(0, N, step):
            out[first : first + step] = self.rows(first, min(first + step, N), dtype)
        return out

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` to ``last`` of :meth:`dequantize`."""
        if self.format.is_float:
            return self.codes[first:last].to(dtype)
        assert self.scales is not None
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        out_RK = code_values(self.codes[first:last], self.format, self.shape[1], exact)
        height, C = self.format.block[0] or self.shape[0], self.format.block[1] or self.shape[1]
        block_R = torch.arange(first, last, device=self.codes.device).div(height, rounding_mode="floor")
        whole = self.shape[1] // C
        parts = [(out_RK[:, : whole * C].unflatten(1, (whole, C)), slice(0, whole))] if whole else []
        if whole * C < self.shape[1]:  # a partial block at the edge
            parts.append((out_RK[:, None, whole * C :], slice(whole, whole + 1)))
        scale_RS = scale_values(self.scales.index_select(0, block_R), self.format, exact)
        zero_RS = None if self.zeros is None else self.zeros.index_select(0, block_R).to(exact)
        for part_RSC, at in parts:
            if zero_RS is not None:
                part_RSC -= zero_RS[:, at, None]
            elif self.format.zero:
                part_RSC -= self.format.zero
            part_RSC *= scale_RS[:, at, None]
        return out_RK.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        held = (self.codes, self.scales, self.zeros)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def zeros_beyond(zeros: Tensor, format: WeightFormat) -> str:
    """Which zero point is no number that a code of ``format`` can be, in words; "" where all are.

    Kernels hold a zero point in the bits of a code, in which any other number would be a wrong one.
    """
    info = torch.iinfo(format.code_dtype)
    least, most = (0, 15) if format.packed else (info.min, info.max)
    ends = [int(end) for end in torch.aminmax(zeros)] if zeros.numel() else []
    far = next((end for end in ends if not least <= end <= most), None)
    return "" if far is None else f"a zero point is {far}, and those of {format.codes} are from {least} to {most}"


def code_values(codes: Tensor, format: WeightFormat, columns: int, dtype: torch.dtype) -> Tensor:
    """What codes mean, without zero points and scales: (R, columns) in ``dtype``, float32 or float64; a new tensor."""
    if not format.packed:
        return codes.to(dtype, copy=True)
    table = _nibbles(format.codes, format.packing, dtype, codes.device)
    pairs = torch.view_as_real(table.index_select(0, codes.reshape(-1).int()))
    return pairs.reshape(codes.shape[0], 2 * codes.shape[1])[:, :columns]


def scale_values(scales: Tensor, format: WeightFormat, dtype: torch.dtype) -> Tensor:
    """Scales as floats."""
    if format.scale != "e8m0":
        return scales.to(dtype)
    return _powers(dtype, scales.device).index_select(0, scales.reshape(-1).int()).view(scales.shape)


@functools.lru_cache(maxsize=64)
def _nibbles(codes: str, packing: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each of the 256 bytes as a complex number: numbers are picked four times as fast as pairs."""
    values = NIBBLES[codes]
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    table = _plain(pairs if packing == "low nibble first" else [p[::-1] for p in pairs], dtype, device)
    with torch.inference_mode(False), _disable_current_modes():
        return torch.view_as_complex(table)


@functools.lru_cache(maxsize=16)
def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """2^(s - 127) for each byte s; 255 is NaN."""
    return _plain([*(math.ldexp(1.0, s - 127) for s in range(255)), math.nan], dtype, device)


def _plain(values: Sequence[float | tuple[float, ...]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that outlives the call: neither a tracer's nor an inference tensor."""
    with torch.inference_mode(False), _disable_current_modes():
        return torch.tensor(values, dtype=dtype).to(device)

"""The weights of an expert as the pointers, sizes and strides of the kernel's C interface, where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.ops.rounded_rows import ROW_BLOCK
from moeopt.ops.unfit import Unfit

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 7}
_LOW = "low nibble first"
CODES = {("int8", True, _LOW): 5, ("uint8", True, _LOW): 5, ("uint4", True, _LOW): 6}
"""What the kernel reads of quantised weights: (codes, symmetric, packing), with the dtype's number in its header."""
KernelWeight = Tensor | QuantizedWeight
ABSENT = (0, 0, 0)
"""``moeopt_vector`` of what is not there."""
NO_MATRIX = (0,) * 12
"""``moeopt_matrix`` of what is not there."""
_NO_SCALES = (0,) * 6
_ABOUT_128 = (0, 128)
"""Zero points of bytes that have no sign: none, and a step that says so."""


def matrix(w: KernelWeight | None, layout: str, rounds: bool = False) -> tuple[int, ...]:
    """``moeopt_matrix``: ``w`` (out, in) where ``layout`` is ``oi``, and in codes always, else (in, out).

    Args:
        rounds: whether codes meet rows that are rounded to 8 bits.

    Raises:
        Unfit: the kernel does not read it.
    """
    if isinstance(w, QuantizedWeight):
        return _codes(w, rounds)
    assert w is not None
    plain(w)
    if w.dim() != 2 or w.dtype not in FLOATS:
        raise Unfit(f"a weight is {str(w.dtype).removeprefix('torch.')} of shape {tuple(w.shape)}")
    (out, into), (so, si) = w.shape, w.stride()
    if layout == "io":
        out, into, so, si = into, out, si, so
    return w.data_ptr(), FLOATS[w.dtype], out, into, so, si, *_NO_SCALES


def reads_codes(format: WeightFormat) -> bool:
    """Whether the kernel reads codes of ``format`` beside rows of floats, where they and their scales lie in rows."""
    return (format.codes, format.symmetric, format.packing) in CODES and format.block[0] == 1


def _codes(w: QuantizedWeight, rounds: bool) -> tuple[int, ...]:
    format, (N, K) = w.format, w.shape
    zeros = w.zeros if rounds and format.codes == "uint4" else None
    kind = format.codes, format.symmetric or zeros is not None, format.packing
    if kind not in CODES or format.block[0] != 1 or w.scales is None:
        which = "int4" if rounds else "symmetric int4"
        raise Unfit(f"the kernel reads int8, 8-bit codes about 128 and {which} with scales for each row, not {format}")
    for t in (w.codes, w.scales, zeros):
        if t is not None:
            plain(t)
    narrow = w.scales.dtype in FLOATS and w.scales.dtype is not torch.float64
    apart = w.scales.shape[1] > 1 and w.scales.stride(1) != 1
    if not narrow or w.codes.stride(1) != 1 or apart:
        raise Unfit(f"codes of strides {w.codes.stride()} and scales of {w.scales.dtype} {w.scales.stride()}")
    dtype, per_byte = CODES[kind], 2 if format.packed else 1
    block = min(format.block[1] or K, K)
    if rounds and block % ROW_BLOCK and block < K:
        raise Unfit(f"rows are rounded in blocks of {ROW_BLOCK}, which {format} cuts: its scales are for {block}")
    if zeros is not None and zeros.stride(1) != 1:
        raise Unfit(f"zero points of strides {zeros.stride()}")
    scales = w.scales.data_ptr(), FLOATS[w.scales.dtype], w.scales.stride(0), block
    without = _ABOUT_128 if format.codes == "uint8" else (0, 0)
    offsets = without if zeros is None else (zeros.data_ptr(), zeros.stride(0))
    return w.codes.data_ptr(), dtype, N, K, w.codes.stride(0) * per_byte, 1, *scales, *offsets


def vector(b: KernelWeight | None, width: int) -> tuple[int, ...]:
    """``moeopt_vector`` of a bias or norm of ``width`` numbers; :class:`Unfit` where the kernel does not read it."""
    if b is None:
        return ABSENT
    assert isinstance(b, Tensor)
    plain(b)
    if tuple(b.shape) != (width,) or b.dtype not in FLOATS:
        raise Unfit(f"a bias or norm is {str(b.dtype).removeprefix('torch.')} of shape {tuple(b.shape)}")
    return b.data_ptr(), FLOATS[b.dtype], b.stride(0)


def plain(t: Tensor) -> None:
    """:class:`Unfit` unless ``t`` is a tensor whose numbers lie at its address, as its strides say."""
    if type(t) not in (Tensor, torch.nn.Parameter):
        raise Unfit(f"a tensor is a {type(t).__name__}")
    if not t.is_cpu or t.layout is not torch.strided or t.is_neg() or (t.numel() and not t.data_ptr()):
        raise Unfit(f"a tensor on {t.device} has no plain memory")

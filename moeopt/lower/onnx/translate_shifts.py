"""Shifts of integers to the right, of which torch's exporter gives another dtype than PyTorch where it is uint8.

unsigned    BitShift
signed      floor(x / 2^n), as an arithmetic shift is
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moeopt.lower.onnx.opset import OPSET as op
from moeopt.value_types import OnnxValue, PyObject

aten = torch.ops.aten
_UNSIGNED = ("UINT8", "UINT16", "UINT32", "UINT64")


def shifted_right(self: OnnxValue, other: PyObject) -> OnnxValue:
    """``self >> other``, each shift less than the bits of the dtype."""
    count = op.Constant(value_int=other) if isinstance(other, int) else other
    if self.dtype is not None and self.dtype.name in _UNSIGNED:
        return op.BitShift(self, op.CastLike(count, self), direction="RIGHT")
    wide, by = op.Cast(self, to=7), op.BitShift(op.Constant(value=_one()), op.Cast(count, to=13), direction="LEFT")
    by = op.Cast(by, to=7)
    return op.CastLike(op.Div(op.Sub(wide, op.Mod(wide, by)), by), self)


def _one() -> PyObject:
    import onnx_ir as ir

    return ir.tensor(1, dtype=ir.DataType.UINT64)


def shifts() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export``."""
    return {
        aten.__rshift__.Scalar: shifted_right,
        aten.__rshift__.Tensor: shifted_right,
        aten.bitwise_right_shift.Tensor: shifted_right,
        aten.bitwise_right_shift.Tensor_Scalar: shifted_right,
    }

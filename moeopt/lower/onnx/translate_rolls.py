"""``roll`` of any sizes: torch's exporter divides by the size of the dimension, and an expert may have no rows.

x  ->  x[at:], x[:at]  joined,    at = -shift mod max(size, 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeopt.lower.onnx.opset import OPSET as op
from moeopt.value_types import OnnxValue

aten = torch.ops.aten
_END = 2**63 - 1


def rolled(self: OnnxValue, shifts: Sequence[int], dims: Sequence[int] = ()) -> OnnxValue:
    """Each dimension of ``dims`` moved by its shift; without any, all elements as they lie."""
    moves = [shifts] if isinstance(shifts, int) else list(shifts)
    along = [dims] if isinstance(dims, int) else list(dims)
    if along:
        for shift, dim in zip(moves, along, strict=True):
            self = _rolled_along(self, shift, dim)
        return self
    flat = _rolled_along(op.Reshape(self, op.Constant(value_ints=[-1])), moves[0], 0)
    return op.Reshape(flat, op.Shape(self), allowzero=1)


def _rolled_along(x: OnnxValue, shift: int, dim: int) -> OnnxValue:
    axis, start, one = (op.Constant(value_ints=[n]) for n in (dim, 0, 1))
    size = op.Max(op.Gather(op.Shape(x), axis), one)
    at = op.Mod(op.Constant(value_ints=[-shift]), size)
    behind = op.Slice(x, at, op.Constant(value_ints=[_END]), axis)
    return op.Concat(behind, op.Slice(x, start, at, axis), axis=dim)


def rolls() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export``."""
    return {aten.roll.default: rolled}

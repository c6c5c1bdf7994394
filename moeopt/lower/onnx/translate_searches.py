"""ATen ops that look for places in sorted numbers: ONNX has none. Here PyTorch's own search by halves is written out.

    start, end = 0, N
    each step, while start < end:    mid = (start + end) / 2;  not a[mid] >= v:  start = mid + 1,  else  end = mid

The same steps give the same places also for numbers that are not sorted, NaN among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moeopt.lower.onnx.opset import OPSET as op
from moeopt.lower.onnx.translate_numbers import code, constant
from moeopt.value_types import OnnxValue, PyObject

aten = torch.ops.aten
_FLOAT, _INT32, _INT64 = 1, 6, 7
_COMPARED = (_FLOAT, 11, _INT32, _INT64)
"""Dtypes that ONNX Runtime compares; narrower numbers are widened, which keeps their order."""
_MOST_STEPS = 32
"""For a number of sorted numbers that is free."""


def _ints(*values: int) -> OnnxValue:
    return op.Constant(value_ints=list(values))


def _comparable(x: OnnxValue) -> OnnxValue:
    if x.dtype is None or int(x.dtype) in _COMPARED:
        return x
    return op.Cast(x, to=_FLOAT if x.dtype.is_floating_point() else _INT32)


def _search(sorted_: OnnxValue, values: OnnxValue, right: bool, narrow: bool, sorter: OnnxValue = None) -> OnnxValue:
    """Places of ``values`` (..., M) among ``sorted_`` (..., N) or (N,)."""
    size, rank = sorted_.shape[-1], len(sorted_.shape)
    if sorter is not None:
        sorted_ = op.GatherElements(sorted_, sorter, axis=-1)
    given, wanted = _comparable(sorted_), _comparable(values)
    count = op.Squeeze(op.Shape(given, start=-1))
    beyond = op.Pad(given, _ints(*[0] * (2 * rank - 1), 1))  # so that mid is a place where N is 0, too
    shape, one, two = op.Shape(values), constant(1, _INT64), constant(2, _INT64)
    start = op.Expand(constant(0, _INT64), shape)
    end = op.Expand(count, shape)
    for _ in range(size.bit_length() if isinstance(size, int) else _MOST_STEPS):
        middle = op.Div(op.Add(start, end), two)
        found = op.Gather(beyond, middle) if rank == 1 else op.GatherElements(beyond, middle, axis=-1)
        stops = op.Greater(found, wanted) if right else op.GreaterOrEqual(found, wanted)
        open_ = op.Less(start, end)
        end, start = (
            op.Where(op.And(open_, stops), middle, end),
            op.Where(op.And(open_, op.Not(stops)), op.Add(middle, one), start),
        )
    return op.Cast(start, to=_INT32) if narrow else op.Identity(start)


def searchsorted(
    sorted_sequence: OnnxValue, self: OnnxValue, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: OnnxValue = None,
) -> OnnxValue:  # fmt: skip
    return _search(sorted_sequence, self, right or side == "right", out_int32, sorter)


def searchsorted_number(sorted_sequence: OnnxValue, self: float, **how: PyObject) -> OnnxValue:
    return searchsorted(sorted_sequence, constant(self, code(sorted_sequence)), **how)


def bucketize(self: OnnxValue, boundaries: OnnxValue, *, out_int32: bool = False, right: bool = False) -> OnnxValue:
    return _search(boundaries, self, right, out_int32)


def searches() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export``."""
    found: dict[PyObject, Callable[..., Any]] = {
        aten.searchsorted.Tensor: searchsorted,
        aten.searchsorted.Scalar: searchsorted_number,
        aten.bucketize.Tensor: bucketize,
    }
    return found

"""ATen ops of layers and reductions whose form in torch's exporter is another function past ordinary numbers.

    diagonal          x times a unit matrix, summed: an infinity or a NaN beside the diagonal makes a NaN of it
    scatter_reduce    "mean" writes the last value; "amax" and "amin" drop a NaN, and take -inf for the least number
                      where ``include_self=False``
    logaddexp2        2^a + 2^b overflows from 128 on
    logcumsumexp      exp(x - max of all): prefixes of small numbers become -inf
    cummax, cummin    no form; a NaN stays from its place on, as in PyTorch
    heaviside         1 for a NaN, where PyTorch has 0
    logit             a NaN becomes ``1 - eps``

Prefixes (``logcumsumexp``, ``cummax``, ``cummin``) are made by doubling: after step k each place holds what 2^k places
up to it give. The number of places must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeopt.lower.onnx.opset import OPSET as op
from moeopt.lower.onnx.translate_numbers import code, constant, is_float, like, logaddexp
from moeopt.value_types import OnnxValue, PyObject

aten = torch.ops.aten
_FLOAT, _INT32, _INT64, _BOOL = 1, 6, 7, 9
_ADDED = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
_NEUTRAL = {"sum": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf"), "mean": 0.0}


def _ints(*values: int) -> OnnxValue:
    return op.Constant(value_ints=list(values))


def diagonal(self: OnnxValue, offset: int = 0, dim1: int = 0, dim2: int = 1) -> OnnxValue:
    """``self`` with ``dim1`` and ``dim2`` of R and C elements last and flat, and each C + 1st of them."""
    rank = len(self.shape)
    dim1, dim2 = dim1 % rank, dim2 % rank
    rest = [d for d in range(rank) if d not in (dim1, dim2)]
    shape = op.Shape(self)
    rows, columns = op.Gather(shape, _ints(dim1)), op.Gather(shape, _ints(dim2))
    flat = op.Concat(op.Gather(shape, _ints(*rest)), op.Mul(rows, columns), axis=0) if rest else op.Mul(rows, columns)
    count = op.Min(op.Sub(rows, _ints(max(-offset, 0))), op.Sub(columns, _ints(max(offset, 0))))
    places = op.Range(constant(0, _INT64), op.Squeeze(op.Max(count, _ints(0))), constant(1, _INT64))
    first = _ints(offset) if offset >= 0 else op.Mul(columns, _ints(-offset))
    places = op.Add(op.Mul(places, op.Add(columns, _ints(1))), first)
    return op.Gather(op.Reshape(op.Transpose(self, perm=[*rest, dim1, dim2]), flat), places, axis=-1)


def scatter_reduce(
    self: OnnxValue, dim: int, index: OnnxValue, src: OnnxValue, reduce: str, include_self: bool = True
) -> OnnxValue:
    """``self`` with ``src`` reduced into the places of ``index``; for ``include_self=False`` those start anew.

    Raises:
        NotImplementedError: a mean of integers, which PyTorch rounds down.
    """
    if reduce == "mean" and not is_float(self):
        raise NotImplementedError("scatter_reduce of integers with reduce='mean' has no form in ONNX")
    if not self.shape:
        self, index, src = (op.Reshape(v, _ints(-1)) for v in (self, index, src))
        return op.Squeeze(scatter_reduce(_ranked(self), 0, _ranked(index), _ranked(src), reduce, include_self))
    if src.shape != index.shape:  # PyTorch reads as much of src as there are indices
        src = op.Slice(src, _ints(*[0] * len(index.shape)), op.Shape(index), _ints(*range(len(index.shape))))

    def scatter(into: OnnxValue, values: OnnxValue, how: str) -> OnnxValue:
        return op.ScatterElements(into, index, values, axis=dim, reduction=how)

    def start(into: OnnxValue, neutral: OnnxValue) -> OnnxValue:
        return into if include_self else scatter(into, op.Expand(neutral, op.Shape(index)), "none")

    neutral = constant(_NEUTRAL[reduce], code(self)) if is_float(self) else _least(self, reduce)
    if reduce == "mean":
        total = scatter(start(self, neutral), src, "add")
        one = constant(1.0, code(self))
        counts = scatter(op.Expand(one, op.Shape(self)), op.Expand(one, op.Shape(index)), "add")
        if not include_self:
            counts = op.Max(op.Sub(counts, one), one)
        return op.Div(total, counts)
    found = scatter(start(self, neutral), src, _ADDED[reduce])
    if reduce in ("sum", "prod") or not is_float(self):
        return found
    lost = start(op.Cast(op.IsNaN(self), to=_INT32), constant(0, _INT32))
    lost = op.Cast(scatter(lost, op.Cast(op.IsNaN(src), to=_INT32), "max"), to=_BOOL)
    return op.Where(lost, constant(float("nan"), code(self)), found)


def _ranked(x: OnnxValue) -> OnnxValue:
    import onnx_ir as ir

    x.shape = ir.Shape([1])
    return x


def _typed(new: OnnxValue, like: OnnxValue) -> OnnxValue:
    """``new`` with the dtype of ``like``, which it has and what is translated next has to know."""
    if like.dtype is not None:
        new.dtype = like.dtype
    return new


def _cast(x: OnnxValue, dtype: int) -> OnnxValue:
    """``x`` in another dtype, which what is translated next has to know."""
    import onnx_ir as ir

    wide = op.Cast(x, to=dtype)
    wide.dtype = ir.DataType(dtype)
    return wide


def _least(x: OnnxValue, reduce: str) -> OnnxValue:
    """The neutral number of integers."""
    if reduce in ("sum", "prod"):
        return constant(int(_NEUTRAL[reduce]), code(x))
    signed, bits = x.dtype.is_signed(), x.dtype.bitwidth
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return constant(least if reduce == "amax" else most, code(x))


def _prefixes(
    name: str, size: PyObject, values: Sequence[OnnxValue], dim: int, join: Callable[..., Sequence[OnnxValue]]
) -> Sequence[OnnxValue]:
    """``join`` of all places up to each, of tuples of tensors with ``size`` places along ``dim``."""
    if not isinstance(size, int):
        raise NotImplementedError(f"{name} over a dimension of free size has no form in ONNX: fix that size")
    step = 1
    while step < size:
        head, early, late = (
            [_typed(op.Slice(v, _ints(a), _ints(b), _ints(dim)), v) for v in values]
            for a, b in ((0, step), (0, size - step), (step, size))
        )
        joined = zip(values, head, join(early, late), strict=True)
        values = [_typed(op.Concat(first, rest, axis=dim), v) for v, first, rest in joined]
        step *= 2
    return values


def logaddexp2(self: OnnxValue, other: OnnxValue) -> OnnxValue:
    ln2 = constant(math.log(2.0), code(self))
    return op.Div(logaddexp(*[_typed(op.Mul(v, ln2), self) for v in (self, other)]), ln2)


def logcumsumexp(self: OnnxValue, dim: int) -> OnnxValue:
    if not self.shape:
        return op.Identity(self)
    dim %= len(self.shape)
    (found,) = _prefixes("logcumsumexp", self.shape[dim], [self], dim, lambda a, b: [logaddexp(a[0], b[0])])
    return op.Identity(found) if found is self else found


def running(largest: bool) -> Callable[..., Any]:
    """``cummax`` or ``cummin``: (values, places); of equal values the last, and a NaN wins, as in PyTorch."""

    def of(self: OnnxValue, dim: int) -> OnnxValue:
        if not self.shape:
            return op.Identity(self), constant(0, _INT64)
        if code(self) == _BOOL:
            wide = _cast(self, _INT32)
            wide.shape = self.shape
            values, places = of(wide, dim)
            return op.Cast(values, to=_BOOL), places
        axis = dim % len(self.shape)
        size = self.shape[axis]

        def join(early: Sequence[OnnxValue], late: Sequence[OnnxValue]) -> Sequence[OnnxValue]:
            keeps = (op.Greater if largest else op.Less)(early[0], late[0])
            if is_float(self):
                keeps = op.Or(keeps, op.And(op.IsNaN(early[0]), op.Not(op.IsNaN(late[0]))))
            return [op.Where(keeps, a, b) for a, b in zip(early, late, strict=True)]

        shape = [1] * len(self.shape)
        shape[axis] = -1
        last = constant(size if isinstance(size, int) else 0, _INT64)
        places = op.Range(constant(0, _INT64), last, constant(1, _INT64))
        places = op.Expand(op.Reshape(places, _ints(*shape)), op.Shape(self))
        name = "cummax" if largest else "cummin"
        values, places = _prefixes(name, size, [self, places], axis, join)
        return (op.Identity(values) if values is self else values), places

    return of


def heaviside(self: OnnxValue, values: OnnxValue) -> OnnxValue:
    zero = constant(0, code(self))
    return op.Where(op.Equal(self, zero), values, op.Cast(op.Greater(self, zero), to=code(self)))


def logit(self: OnnxValue, eps: float | None = None) -> OnnxValue:
    x = self if is_float(self) else _cast(self, _FLOAT)
    z = x
    if eps is not None:  # for eps > 1/2 PyTorch's lower bound comes first
        low, high = like(eps, x), like(1 - eps, x)
        z = op.Where(op.Less(x, low), low, op.Where(op.Greater(x, high), high, x))
    return op.Log(op.Div(z, op.Sub(like(1.0, x), z)))


def layers() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export``."""
    return {
        aten.diagonal.default: diagonal,
        aten.diagonal_copy.default: diagonal,
        aten.scatter_reduce.two: scatter_reduce,
        aten.logaddexp2.default: logaddexp2,
        aten.logcumsumexp.default: logcumsumexp,
        aten.cummax.default: running(True),
        aten.cummin.default: running(False),
        aten.heaviside.default: heaviside,
        aten.logit.default: logit,
        aten.special_logit.default: logit,
    }

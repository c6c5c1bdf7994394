"""ATen ops whose ONNX form is missing from, or differs in, torch's own exporter.

    sort, topk, max, min     a NaN counts as the largest value in PyTorch; ONNX Runtime's TopK and ArgMax leave its
    argmax, amax, amin       place open, and a reduction drops it. Here the order is taken of the values with NaN at
                             +inf, and values are gathered from the originals, so a NaN stays one.
    sort.stable              TopK of all values; it keeps the order of equal ones
    kthvalue, median         no form in the exporter: the place k, or the lower middle one, of the sorted values
    max, min, largest norm   alike
    cdist                    no form: norms of differences, one center after the other where there are few
    roll                     of no rows stops ONNX Runtime in the exporter's form
    squeeze                  of a size that is not 1 does nothing in PyTorch; ONNX refuses the graph

Each function builds nodes with onnxscript's ``opset20``; names end in what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moeopt.lower.onnx.opset import OPSET as op
from moeopt.lower.onnx.translate_attention import attentions
from moeopt.lower.onnx.translate_layers import layers
from moeopt.lower.onnx.translate_number_table import numbers
from moeopt.lower.onnx.translate_rolls import rolls
from moeopt.lower.onnx.translate_searches import searches
from moeopt.lower.onnx.translate_shifts import shifts
from moeopt.value_types import OnnxValue, PyObject

aten = torch.ops.aten
_CENTERS = 128
"""Rows of which distances are written out one after the other: together, their differences are many times the rows."""


def is_float(x: OnnxValue) -> bool:
    return x.dtype is None or x.dtype.is_floating_point()


def number(value: float, x: OnnxValue) -> OnnxValue:
    """``value`` in the dtype of ``x``."""
    import onnx_ir as ir

    if x.dtype is None:
        return op.CastLike(op.Constant(value_float=value), x)
    return op.Constant(value=ir.tensor(value, dtype=x.dtype))


def ordered(x: OnnxValue, nan: float = float("inf")) -> OnnxValue:
    """``x`` with every NaN at ``nan``."""
    if not is_float(x):
        return x
    return op.Where(op.IsNaN(x), number(nan, x), x)


def sized(x: OnnxValue) -> OnnxValue:
    return op.Cast(x, to=6) if x.dtype is not None and int(x.dtype) in (2, 3, 4, 5, 9) else x


def first(key: OnnxValue, k: OnnxValue, dim: int, largest: bool) -> OnnxValue:
    """Indices of the ``k`` largest or smallest, equal ones in their order."""
    _, indices = op.TopK(sized(key), k, axis=dim, largest=int(largest), sorted=1)
    return indices


def one(value: int) -> OnnxValue:
    return op.Constant(value_ints=[value])


def topk(self: OnnxValue, k: OnnxValue, dim: int = -1, largest: bool = True, sorted: bool = True) -> OnnxValue:
    if not self.shape:
        self = op.Reshape(self, one(1))
    many = one(k) if isinstance(k, int) else op.Reshape(op.Cast(k, to=7), one(1))
    indices = first(ordered(self), many, dim, largest)
    return op.GatherElements(self, indices, axis=dim), indices


def sort(self: OnnxValue, dim: int = -1, descending: bool = False) -> OnnxValue:
    if len(self.shape) == 0:
        return op.Identity(self), op.Constant(value_int=0)
    axis = dim % len(self.shape)
    indices = first(ordered(self), op.Shape(self, start=axis, end=axis + 1), axis, descending)
    return op.GatherElements(self, indices, axis=axis), indices


def sort_stable(self: OnnxValue, stable: bool = True, dim: int = -1, descending: bool = False) -> OnnxValue:
    return sort(self, dim, descending)


def kthvalue(self: OnnxValue, k: int, dim: int = -1, keepdim: bool = False) -> OnnxValue:
    if len(self.shape) == 0:
        return op.Identity(self), op.Constant(value_int=0)
    return _at(self, one(k), dim, keepdim)


def _at(self: OnnxValue, k: OnnxValue, dim: int, keepdim: bool, marked: OnnxValue = None) -> OnnxValue:
    """(values, indices) of the ``k``-th smallest along ``dim``; the first that is ``marked`` where one is."""
    indices = op.Gather(first(ordered(self), k, dim, False), op.Sub(k, one(1)), axis=dim)
    if marked is not None:
        flags = op.Cast(marked, to=6)
        lost = op.Cast(op.ReduceMax(flags, one(dim), keepdims=1), to=9)
        indices = op.Where(lost, op.ArgMax(flags, axis=dim, keepdims=1), indices)
    values = op.GatherElements(self, indices, axis=dim)
    return (values, indices) if keepdim else (op.Squeeze(values, one(dim)), op.Squeeze(indices, one(dim)))


def median(self: OnnxValue, dim: int, keepdim: bool = False) -> OnnxValue:
    if len(self.shape) == 0:
        return op.Identity(self), op.Constant(value_int=0)
    axis = dim % len(self.shape)
    middle = op.Div(op.Add(op.Shape(self, start=axis, end=axis + 1), one(1)), one(2))
    return _at(self, middle, axis, keepdim, op.IsNaN(self) if is_float(self) else None)


def median_of_all(self: OnnxValue) -> OnnxValue:
    flat = op.Reshape(self, one(-1))
    middle = op.Div(op.Add(op.Shape(flat), one(1)), one(2))
    return _at(flat, middle, 0, False, op.IsNaN(flat) if is_float(self) else None)[0]


def extreme(largest: bool) -> Callable[..., Any]:
    def of_dim(self: OnnxValue, dim: int, keepdim: bool = False) -> OnnxValue:
        if len(self.shape) == 0:
            return op.Identity(self), op.Constant(value_int=0)
        arg = op.ArgMax if largest else op.ArgMin
        key = sized(ordered(self, float("inf") if largest else float("-inf")))
        indices = arg(key, axis=dim, keepdims=1)
        values = op.GatherElements(self, indices, axis=dim)
        if keepdim:
            return values, indices
        return op.Squeeze(values, one(dim)), op.Squeeze(indices, one(dim))

    return of_dim


def argument(largest: bool) -> Callable[..., Any]:
    def of(self: OnnxValue, dim: int | None = None, keepdim: bool = False) -> OnnxValue:
        arg = op.ArgMax if largest else op.ArgMin
        key = sized(ordered(self, float("inf") if largest else float("-inf")))
        if dim is None:
            index = op.Squeeze(arg(op.Reshape(key, one(-1)), axis=0, keepdims=0))
            return op.Reshape(index, op.Constant(value_ints=[1] * len(self.shape))) if keepdim else index
        if len(self.shape) == 0:
            return op.Constant(value_int=0)
        return arg(key, axis=dim, keepdims=int(keepdim))

    return of


def reduced(largest: bool) -> Callable[..., Any]:
    def over(self: OnnxValue, dim: PyObject = (), keepdim: bool = False) -> OnnxValue:
        reduce = op.ReduceMax if largest else op.ReduceMin
        dims = [dim] if isinstance(dim, int) else list(dim)
        if not dims and not self.shape:
            return op.Identity(self)
        axes = op.Constant(value_ints=dims or list(range(len(self.shape))))
        if self.dtype is not None and int(self.dtype) == 9:
            return op.Cast(reduce(op.Cast(self, to=6), axes, keepdims=int(keepdim)), to=9)
        value = reduce(self, axes, keepdims=int(keepdim))
        if not is_float(self):
            return value
        lost = op.ReduceMax(op.Cast(op.IsNaN(self), to=6), axes, keepdims=int(keepdim))
        return op.Where(op.Cast(lost, to=9), number(float("nan"), self), value)

    return over


def vector_norm(
    self: OnnxValue, ord: float = 2.0, dim: PyObject = None, keepdim: bool = False, dtype: PyObject = None
) -> OnnxValue:
    import onnx_ir as ir

    x = self if dtype in (None, -1) else op.Cast(self, to=dtype)
    if not self.shape:
        return op.Abs(x)
    dims = [dim] if isinstance(dim, int) else list(dim or range(len(self.shape)))
    axes = op.Constant(value_ints=dims)
    if abs(ord) == float("inf"):
        return reduced(ord > 0)(op.Abs(x), dims, keepdim)
    if ord in (1, 2):
        return (op.ReduceL1 if ord == 1 else op.ReduceL2)(x, axes, keepdims=int(keepdim))
    if ord == 0:
        apart = op.Not(op.Equal(x, op.CastLike(op.Constant(value_float=0.0), x)))
        return op.ReduceSum(op.CastLike(apart, x), axes, keepdims=int(keepdim))
    power = op.Constant(value=ir.tensor(float(ord), dtype=x.dtype or ir.DataType.FLOAT))
    total = op.ReduceSum(op.Pow(op.Abs(x), power), axes, keepdims=int(keepdim))
    return op.Pow(total, op.Reciprocal(power))


def distances(x1: OnnxValue, x2: OnnxValue, p: float = 2.0, compute_mode: int | None = None) -> OnnxValue:
    count, rank = x2.shape[-2], len(x2.shape)
    if not isinstance(count, int) or not 0 < count <= _CENTERS:
        apart = op.Sub(op.Unsqueeze(x1, one(len(x1.shape) - 1)), op.Unsqueeze(x2, one(rank - 2)))
        return norm_of(apart, p, 0)
    columns = [norm_of(op.Sub(x1, op.Gather(x2, one(n), axis=rank - 2)), p, 1) for n in range(count)]
    return op.Concat(*columns, axis=-1) if count > 1 else columns[0]


def norm_of(x: OnnxValue, p: float, keepdims: int) -> OnnxValue:
    import onnx_ir as ir

    axes, size = one(-1), op.Abs(x)
    if p == 2:
        return op.ReduceL2(x, axes, keepdims=keepdims)
    if p == 1:
        return op.ReduceL1(x, axes, keepdims=keepdims)
    if p == float("inf"):
        return op.ReduceMax(size, axes, keepdims=keepdims)
    if p == 0:  # PyTorch adds min(ceil(|x|), 1): a NaN stays
        apart = op.CastLike(op.Not(op.Equal(x, op.CastLike(op.Constant(value_float=0.0), x))), x)
        return op.ReduceSum(op.Where(op.IsNaN(x), x, apart), axes, keepdims=keepdims)
    power = op.CastLike(op.Constant(value=ir.tensor(float(p), dtype=ir.DataType.DOUBLE)), x)
    return op.Pow(op.ReduceSum(op.Pow(size, power), axes, keepdims=keepdims), op.Reciprocal(power))


def squeeze(self: OnnxValue, dim: PyObject = None) -> OnnxValue:
    rank = len(self.shape)
    named = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [d % rank for d in named if rank and self.shape[d] == 1]
    return op.Squeeze(self, op.Constant(value_ints=axes)) if axes else op.Identity(self)


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export``."""
    return (
        numbers()
        | rolls()
        | shifts()
        | layers()
        | attentions()
        | searches()
        | {
            aten.linalg_vector_norm.default: vector_norm,
            aten._cdist_forward.default: distances,
            aten._euclidean_dist.default: distances,
            aten.squeeze.default: squeeze,
            aten.squeeze.dim: squeeze,
            aten.squeeze.dims: squeeze,
            aten.topk.default: topk,
            aten.sort.default: sort,
            aten.sort.stable: sort_stable,
            aten.kthvalue.default: kthvalue,
            aten.median.dim: median,
            aten.median.default: median_of_all,
            aten.max.dim: extreme(True),
            aten.min.dim: extreme(False),
            aten.argmax.default: argument(True),
            aten.argmin.default: argument(False),
            aten.amax.default: reduced(True),
            aten.max.default: reduced(True),
            aten.min.default: reduced(False),
            aten.amin.default: reduced(False),
        }
    )

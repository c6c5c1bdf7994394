"""``scaled_dot_product_attention`` of any number of dimensions, masked rows included.

torch's exporter has it for four dimensions, and a query that no key may be seen by gets the mean of all values there
where the mask is boolean, and NaN where it is of -inf. PyTorch gives zeros: a padded query, an empty memory. (Its
``nn.TransformerEncoderLayer`` gives NaN for a sequence that is wholly padded, unless gradients are on: it then calls
this op.)

Shape legend: T queries, S keys, D elements of each; what is before them in ``query``, ``key`` and ``value`` broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moeopt.lower.onnx.opset import OPSET as op
from moeopt.lower.onnx.translate_numbers import code, constant
from moeopt.value_types import OnnxValue

aten = torch.ops.aten
_INT32, _INT64, _BOOL = 6, 7, 9


def attention(
    query: OnnxValue,
    key: OnnxValue,
    value: OnnxValue,
    attn_mask: OnnxValue | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> OnnxValue:
    """softmax(query key^T scale + mask) value: (..., T, D), (..., S, D), (..., S, D) and a mask that broadcasts to
    (..., T, S), as ``torch.nn.functional.scaled_dot_product_attention`` has it.

    Args:
        dropout_p: 0; a graph that draws random numbers does not come here.
    """
    dtype, rank = code(query), len(query.shape)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        key, value = (_repeated(v, query) for v in (key, value))
    root = _root_of_scale(query, scale)
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    asked = op.Neg(query) if scale is not None and scale < 0 else query
    scores = op.MatMul(op.Mul(asked, root), op.Mul(turned, root))
    if is_causal:
        scores = op.Add(scores, op.Where(_causal(query, key, rank), constant(0.0, dtype), constant(-math.inf, dtype)))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    return _masked(scores, attn_mask, value, dtype)


def _masked(scores: OnnxValue, mask: OnnxValue, value: OnnxValue, dtype: int) -> OnnxValue:
    """Of a query that sees nothing, the mean of all values times 0: 0, and NaN beside a NaN, as PyTorch's sum."""
    never, zero = constant(-math.inf, dtype), constant(0.0, dtype)
    boolean = code(mask) == _BOOL
    mask = mask if boolean or code(mask) == dtype else op.Cast(mask, to=dtype)
    if boolean:
        sees = op.Cast(op.ReduceMax(op.Cast(mask, to=_INT32), _last(), keepdims=1), to=_BOOL)
        mask = op.Where(op.Or(mask, op.Not(sees)), zero, never)
    else:
        sees = op.Not(op.Equal(op.ReduceMax(mask, _last(), keepdims=1), never))
        mask = op.Where(sees, mask, zero)
    return op.Mul(op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), value), op.Cast(sees, to=dtype))


def _last() -> OnnxValue:
    return op.Constant(value_ints=[-1])


def _size(x: OnnxValue, axis: int) -> OnnxValue:
    """The size of an axis: a tensor of one number."""
    return op.Shape(x, start=axis, end=axis + 1)


def _root_of_scale(query: OnnxValue, scale: float | None) -> OnnxValue:
    """The square root of the scale, which both factors get: their product overflows no sooner than in PyTorch."""
    size, dtype = query.shape[-1], code(query)
    if scale is None and not isinstance(size, int):
        whole = op.Cast(_size(query, len(query.shape) - 1), to=dtype)
        return op.Reciprocal(op.Sqrt(op.Sqrt(whole)))
    found = abs(scale) if scale is not None else 1 / math.sqrt(size) if size else 1.0
    return constant(math.sqrt(found), dtype)


def _causal(query: OnnxValue, key: OnnxValue, rank: int) -> OnnxValue:
    """(T, S): a query sees the keys up to its own place, counted from the first of both."""
    shape = op.Concat(_size(query, rank - 2), _size(key, rank - 2), axis=0)
    return op.Trilu(op.Expand(constant(True, _BOOL), shape), upper=0)


def _repeated(x: OnnxValue, query: OnnxValue) -> OnnxValue:
    """``x`` of G heads, each repeated for its query heads: (..., G, S, D) as (..., H, S, D)."""
    rank = len(x.shape)
    heads, many = _size(query, rank - 3), op.Div(_size(query, rank - 3), _size(x, rank - 3))
    first, groups, rest = op.Shape(x, end=rank - 3), _size(x, rank - 3), op.Shape(x, start=rank - 2)
    wide = op.Unsqueeze(x, op.Constant(value_ints=[rank - 2]))
    wide = op.Expand(wide, op.Concat(first, groups, many, rest, axis=0))
    return op.Reshape(wide, op.Concat(first, heads, rest, axis=0), allowzero=1)


def attentions() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for ``torch.onnx.export``."""
    return {aten.scaled_dot_product_attention.default: attention}

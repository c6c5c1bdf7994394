"""Arithmetic on sizes, in Python: what ONNX computes a shape with."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.values import SizeValue
from moeopt.value_types import PyObject


def _arrays(call: NodeCall) -> list[Any]:
    return [None if v is None else v.array for v in call.inputs]


def _elementwise(function: PyObject) -> Callable[[NodeCall], PyObject]:
    def run(call: NodeCall) -> PyObject:
        return np.frompyfunc(function, len(call), 1)(*_arrays(call))

    return run


def _trunc_div(a: PyObject, b: PyObject) -> PyObject:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # sizes are not negative


def _gather(call: NodeCall) -> PyObject:
    x, at = _arrays(call)
    return np.take(x, np.asarray(at, dtype=np.int64), axis=call.attribute("axis", 0))


def _slice(call: NodeCall) -> PyObject:
    x, starts, ends, *rest = _arrays(call)
    axes = rest[0] if rest and rest[0] is not None else np.arange(starts.size)
    steps = rest[1] if len(rest) > 1 else np.ones(starts.size, dtype=object)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts.flat, ends.flat, axes.flat, steps.flat, strict=True):
        stop = None if (step < 0 and end < -(1 << 31)) else end
        index[axis] = slice(start, stop, step)
    return x[tuple(index)]


def _concat(call: NodeCall) -> PyObject:
    return np.concatenate(_arrays(call), axis=call.attribute("axis", 0))


def _squeeze(call: NodeCall) -> PyObject:
    x, axes = call.inputs[0].array, call.axes(1)
    return np.squeeze(x, axis=None if axes is None else tuple(axes))


def _unsqueeze(call: NodeCall) -> PyObject:
    return np.expand_dims(call.inputs[0].array, tuple(call.axes(1)))


def _reshape(call: NodeCall) -> PyObject:
    return call.inputs[0].array.reshape([int(n) for n in call.numbers(1)])


def _reduce_prod(call: NodeCall) -> PyObject:
    x = call.inputs[0].array
    product = functools.reduce(operator.mul, x.flat, 1)
    return np.asarray([product] if call.attribute("keepdims", 1) else product, dtype=object)


def _split(call: NodeCall) -> PyObject:
    sizes = call.numbers(1) if call.get(1) is not None else call.attribute("split")
    x = call.inputs[0].array
    sizes = sizes or [x.shape[0] // call.outputs] * call.outputs
    return tuple(np.split(x, np.cumsum(sizes)[:-1]))


def _identity(call: NodeCall) -> PyObject:
    return call.inputs[0].array


SIZES: dict[str, Callable[[NodeCall], PyObject]] = {
    **{name: _elementwise(function) for name, function in {
        "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": _trunc_div, "Neg": operator.neg,
        "Equal": lambda a, b: a == b, "Greater": operator.gt, "Less": operator.lt, "GreaterOrEqual": operator.ge,
        "LessOrEqual": operator.le, "Not": lambda a: not a, "And": lambda a, b: a and b, "Or": lambda a, b: a or b,
        "Where": lambda c, a, b: a if c else b, "Abs": abs,
    }.items()},
    "Min": lambda call: functools.reduce(np.frompyfunc(min, 2, 1), _arrays(call)),
    "Max": lambda call: functools.reduce(np.frompyfunc(max, 2, 1), _arrays(call)),
    "Gather": _gather, "Slice": _slice, "Concat": _concat, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Reshape": _reshape, "ReduceProd": _reduce_prod, "Split": _split, "Identity": _identity,
}  # fmt: skip

_FLAGS = {"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Not", "And", "Or"}


def on_sizes(op_type: str, call: NodeCall) -> PyObject:
    """The result of a node whose inputs are all known; None where sizes are not computed with that operator."""
    if op_type == "Cast":
        from moeopt.onnx_in.dtypes import torch_dtype

        dtype = torch_dtype(call.attribute("to"), call.node)
        return (
            None
            if dtype.is_floating_point or call.inputs[0].dtype.is_floating_point
            else SizeValue(call.inputs[0].array, dtype)
        )
    if op_type not in SIZES or any(v is not None and v.dtype.is_floating_point for v in call.inputs):
        return None
    dtype = torch.bool if op_type in _FLAGS else call.inputs[-1 if op_type == "Where" else 0].dtype
    found = SIZES[op_type](call)
    if isinstance(found, tuple):
        return tuple(SizeValue(part, dtype) for part in found)
    return SizeValue(found, dtype)

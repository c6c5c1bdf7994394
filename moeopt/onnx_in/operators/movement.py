"""Data moved and counted, not computed: shapes, slices, gathers, scatters, joins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.values import SizeValue, tensor
from moeopt.value_types import PyObject


def _shape(call: NodeCall) -> SizeValue:
    shape = list(call.tensor(0).shape)
    return SizeValue(shape[call.attribute("start", 0) : call.attribute("end", len(shape))])


def _size(call: NodeCall) -> SizeValue:
    return SizeValue(math.prod(call.tensor(0).shape))


def _reshape(call: NodeCall) -> Tensor:
    x, shape = call.tensor(0), call.numbers(1)
    if not call.attribute("allowzero", 0):
        shape = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def _flatten(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    axis = call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    return x.permute(call.attribute("perm") or tuple(reversed(range(x.dim()))))


def _squeeze(call: NodeCall) -> Tensor:
    x, axes = call.tensor(0), call.axes(1)
    axes = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else axes
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.squeeze(axis)
    return x


def _unsqueeze(call: NodeCall) -> Tensor:
    x, axes = call.tensor(0), call.axes(1)
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(call: NodeCall) -> Tensor:
    shape, alone = call.numbers(1), call.inputs[0]
    if isinstance(alone, SizeValue) and alone.number is not None and len(shape) >= alone.array.ndim:
        return torch.full(shape, alone.number, dtype=alone.dtype)
    x = call.tensor(0)
    own = [1] * (len(shape) - x.dim()) + list(x.shape)
    shape = [1] * (len(own) - len(shape)) + shape
    wide = [a if isinstance(n, int) and n == 1 else n for n, a in zip(shape, own, strict=True)]
    return x.expand(wide)


def _tile(call: NodeCall) -> Tensor:
    return call.tensor(0).repeat(call.numbers(1))


def _concat(call: NodeCall) -> Tensor:
    return torch.cat([call.tensor(n) for n in range(len(call))], call.attribute("axis"))


def _split(call: NodeCall) -> tuple[Tensor, ...]:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    sizes = call.numbers(1) if call.get(1) is not None else call.attribute("split")
    if sizes is None:  # equal parts, the last of what is left
        part = -(-x.shape[axis] // call.outputs)
        sizes = [part] * (call.outputs - 1) + [x.shape[axis] - part * (call.outputs - 1)]
    return tuple(x.split(sizes, axis))


def _slice(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    starts, ends = call.numbers(1), call.numbers(2)
    axes = call.numbers(3) if call.get(3) is not None else range(len(starts))
    steps = call.numbers(4) if call.get(4) is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            x = _backwards(call, x, axis, start, end, step)
            continue
        x = _sliced(x, axis, start, end, step)
    return x


def _backwards(call: NodeCall, x: Tensor, axis: int, start: PyObject, end: PyObject, step: int) -> Tensor:
    size = x.shape[axis]
    if step == -1 and isinstance(start, int) and isinstance(end, int) and start == -1 and end <= -(1 << 31):
        return x.flip(axis)
    if not all(isinstance(n, int) for n in (size, start, end)):
        raise Declined(f"{call.node} slices backwards by {step} to an end that is no constant")
    last = end + size if -size <= end < 0 else end  # an end before the first element takes that too
    chosen = range(*slice(start, None if last < 0 else last, step).indices(size))
    return x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))


def _sliced(x: Tensor, axis: int, start: PyObject, end: PyObject, step: int) -> Tensor:
    made: Tensor = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return made


def _gather(call: NodeCall) -> Tensor:
    x, axis, at = call.tensor(0), call.attribute("axis", 0), call.get(1)
    if isinstance(at, SizeValue) and at.array.ndim == 0 and isinstance(at.array.item(), int):
        return x.select(axis, at.array.item())
    index = tensor(at)
    axis = axis % x.dim()
    if index.dim() == 0:
        return x.index_select(axis, _wrapped(call, index.reshape(1), x.shape[axis])).squeeze(axis)
    flat = x.index_select(axis, _wrapped(call, index.reshape(-1), x.shape[axis]))
    return flat.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _wrapped(call: NodeCall, index: Tensor, size: PyObject) -> Tensor:
    """Indices that count from the end, as ONNX takes them and torch does not.

    The attribute ``from_zero``, of steps and not of ONNX, says that none does.
    """
    if call.attribute("from_zero", 0):
        return index
    return torch.where(index < 0, index + size, index)


def _gather_elements(call: NodeCall) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    return x.gather(axis, _wrapped(call, call.tensor(1), x.shape[axis]))


def _gather_nd(call: NodeCall) -> Tensor:
    x, at, lead = call.tensor(0), call.tensor(1), call.attribute("batch_dims", 0)
    rows = [
        torch.arange(x.shape[d], device=x.device).reshape([-1 if d == axis else 1 for axis in range(at.dim() - 1)])
        for d in range(lead)
    ]
    return x[tuple([*rows, *at.unbind(-1)])]


def _scatter_elements(call: NodeCall) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    at, updates = _wrapped(call, call.tensor(1), x.shape[axis]), call.tensor(2)
    how = call.attribute("reduction", "none")
    if how == "none":
        return x.scatter(axis, at, updates)
    if how == "add":
        return x.scatter_add(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, {"mul": "prod", "max": "amax", "min": "amin"}[how])


def _scatter_nd(call: NodeCall) -> Tensor:
    x, at, updates = call.tensor(0), call.tensor(1), call.tensor(2)
    how = call.attribute("reduction", "none")
    if how not in ("none", "add"):
        raise Declined(f"{call.node} scatters with reduction={how}, which the interpreter does not read")
    return x.index_put(tuple(at.unbind(-1)), updates, accumulate=how == "add")


def _nonzero(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    return (x if x.dim() else x.reshape(1)).nonzero().t()


def _one_hot(call: NodeCall) -> Tensor:
    at, values = call.tensor(0), call.tensor(2)
    (depth,) = call.numbers(1)
    axis = call.attribute("axis", -1)
    axis = axis % (at.dim() + 1)
    shape = [1] * (at.dim() + 1)
    shape[axis] = depth
    rows = torch.arange(depth, device=at.device, dtype=torch.int64).reshape(shape)
    hit = _wrapped(call, at.long(), depth).unsqueeze(axis) == rows
    return torch.where(hit, values[1], values[0])


def _sequence(call: NodeCall) -> PyObject:
    return [tensor(value) for value in call.inputs]


def _from_sequence(call: NodeCall) -> Tensor:
    joined = torch.stack if call.attribute("new_axis", 0) else torch.cat
    return joined(call.inputs[0], call.attribute("axis"))


def _constant_of_shape(call: NodeCall) -> PyObject:
    value = call.attribute("value")
    shape = call.numbers(0)
    number, dtype = (0.0, torch.float32) if value is None else (value.reshape(-1)[0].item(), value.dtype)
    if dtype == torch.int64 and len(shape) <= 1 and all(isinstance(n, int) and n <= 64 for n in shape):
        filled: list[Any] = [number] * (shape[0] if shape else 1)
        return SizeValue(filled if shape else number)
    return torch.full(shape, number, dtype=dtype)


def _range(call: NodeCall) -> Tensor:
    start, limit, step = (v for n in range(3) for v in call.numbers(n))
    if not isinstance(limit, torch.SymInt) and not isinstance(start, torch.SymInt) and (limit - start) * step < 0:
        limit = start
    return torch.arange(start, limit, step, dtype=call.inputs[0].dtype)


def _trilu(call: NodeCall) -> Tensor:
    k = call.numbers(1)[0] if call.get(1) is not None else 0
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call.tensor(0), k)


def _pad(call: NodeCall) -> Tensor:
    x, pads = call.tensor(0), call.numbers(1)
    if call.attribute("mode", "constant") != "constant" or call.get(3) is not None:
        raise Declined(f"{call.node} pads otherwise than with a constant at every axis")
    fill = call.optional(2)
    half = len(pads) // 2
    flat = [n for axis in reversed(range(half)) for n in (pads[axis], pads[half + axis])]
    return F.pad(x, flat, value=0 if fill is None else fill.item())


def _eye_like(call: NodeCall) -> Tensor:
    x = call.tensor(0)
    if call.attribute("k", 0):
        raise Declined(f"{call.node} makes another diagonal than the main one")
    from moeopt.onnx_in.dtypes import torch_dtype

    wanted = call.attribute("dtype")
    dtype = x.dtype if wanted is None else torch_dtype(wanted, call.node)
    return torch.eye(x.shape[0], x.shape[1], dtype=dtype, device=x.device)


def _identity(call: NodeCall) -> PyObject:
    return call.inputs[0]


def _dropout(call: NodeCall) -> PyObject:
    training = call.get(2)
    if training is not None and not (isinstance(training, SizeValue) and not training.array.item()):
        raise Declined(f"{call.node} is a dropout in training mode")
    return (call.inputs[0], *([torch.ones_like(call.tensor(0), dtype=torch.bool)] * (call.outputs - 1)))[: call.outputs]


MOVEMENT: dict[str, Callable[[NodeCall], Any]] = {
    "Shape": _shape, "Size": _size, "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose,
    "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile, "Concat": _concat,
    "Split": _split, "Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements, "Scatter": _scatter_elements, "ScatterND": _scatter_nd,
    "NonZero": _nonzero, "OneHot": _one_hot, "ConstantOfShape": _constant_of_shape, "Range": _range, "Trilu": _trilu,
    "SequenceConstruct": _sequence, "ConcatFromSequence": _from_sequence,
    "Pad": _pad, "EyeLike": _eye_like, "Identity": _identity, "Dropout": _dropout,
}  # fmt: skip

"""Sums, means, norms, softmax, top-k: what looks along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.value_types import PyObject


def _reduce(function: Callable[..., Any]) -> Callable[[NodeCall], Tensor]:
    """``function(x, axes, keepdim)``, axes an input or an attribute; none of them means every axis, or no change."""

    def run(call: NodeCall) -> Tensor:
        x, axes = call.tensor(0), call.axes(1)
        if not axes and call.attribute("noop_with_empty_axes", 0):  # each element by itself
            alone: Tensor = function(x.unsqueeze(-1), [-1], False)
            return alone.to(x.dtype)
        axes = list(axes) if axes else list(range(x.dim()))
        reduced: Tensor = function(x, axes, bool(call.attribute("keepdims", 1)))
        return reduced.to(x.dtype)

    return run


_HALVES = (torch.float16, torch.bfloat16)


def _in_float(x: Tensor) -> Tensor:
    """What ONNX Runtime squares: halves as float32, in which the square of none is infinite."""
    return x.float() if x.dtype in _HALVES else x


def _mean(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    """The mean; of whole numbers the quotient without its fraction."""
    if x.is_floating_point():
        return x.mean(axes, keepdim)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(axes, keepdim), count, rounding_mode="trunc")


def _extreme(function: Callable[..., Tensor], of_none: float) -> Callable[..., Tensor]:
    """``amax`` or ``amin``; of no elements the infinity that any element is beyond."""

    def run(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
        if x.is_floating_point() and any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
            return torch.full_like(x.sum(axes, keepdim), of_none)
        return function(x, axes, keepdim)

    return run


def _prod(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _arg(function: Callable[..., Tensor]) -> Callable[[NodeCall], Tensor]:
    def run(call: NodeCall) -> Tensor:
        if call.attribute("select_last_index", 0):
            raise Declined(f"{call.node} takes the last of equal values, which torch does not")
        return function(call.tensor(0), call.attribute("axis", 0), bool(call.attribute("keepdims", 1)))

    return run


def _top_k(call: NodeCall) -> tuple[Tensor, Tensor]:
    (k,) = call.numbers(1)
    axis = call.attribute("axis", -1)
    values, ids = call.tensor(0).sort(dim=axis, descending=bool(call.attribute("largest", 1)), stable=True)
    return values.narrow(axis, 0, k), ids.narrow(axis, 0, k)


def _softmax(function: Callable[..., Tensor]) -> Callable[[NodeCall], Tensor]:
    def run(call: NodeCall) -> Tensor:
        return function(call.tensor(0), dim=call.attribute("axis", -1))

    return run


def _cumsum(call: NodeCall) -> Tensor:
    (axis,) = call.numbers(1)
    x = call.tensor(0)
    x = x.flip(axis) if call.attribute("reverse", 0) else x
    if call.attribute("exclusive", 0):  # shifted: a sum less its last term would round, and be NaN at infinities
        size = x.shape[axis]
        x = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, size - 1)], axis) if size else x
    summed = x.cumsum(axis).to(x.dtype)
    return summed.flip(axis) if call.attribute("reverse", 0) else summed


def _layer_norm(call: NodeCall) -> Tensor:
    if call.outputs > 1:
        raise Declined(f"{call.node} also gives its mean, which the interpreter does not")
    x, axis = call.tensor(0), call.attribute("axis", -1)
    shape = x.shape[axis % x.dim() :]
    weight, bias = call.tensor(1), call.optional(2)
    if weight.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, weight, bias, call.attribute("epsilon", 1e-5))
    scaled = F.layer_norm(x, shape, eps=call.attribute("epsilon", 1e-5)) * weight
    return scaled if bias is None else scaled + bias


def _rms_norm(call: NodeCall) -> Tensor:
    if call.outputs > 1:
        raise Declined(f"{call.node} also gives its inverse deviation, which the interpreter does not")
    x, axis = call.tensor(0), call.attribute("axis", -1)
    dims = list(range(axis % x.dim(), x.dim()))
    wide = _in_float(x)
    scaled = wide * torch.rsqrt((wide * wide).mean(dims, keepdim=True) + call.attribute("epsilon", 1e-5))
    return scaled.to(x.dtype) * call.tensor(1)


def _batch_norm(call: NodeCall) -> Tensor:
    if call.outputs > 1 or call.attribute("training_mode", 0):
        raise Declined(f"{call.node} is in training mode, in which its rows depend on one another")
    weight, bias, mean, variance = (call.tensor(number) for number in range(1, 5))
    return F.batch_norm(call.tensor(0), mean, variance, weight, bias, eps=call.attribute("epsilon", 1e-5))


def _instance_norm(call: NodeCall) -> Tensor:
    """Written out: torch's own form takes the channels of all samples for the features of one."""
    x = call.tensor(0)
    wide, dims = _in_float(x), list(range(2, x.dim()))
    variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    scaled = (wide - mean) * torch.rsqrt(variance + call.attribute("epsilon", 1e-5))
    weight, bias = (call.tensor(number).view(-1, *(1 for _ in dims)) for number in (1, 2))
    return scaled.to(x.dtype) * weight + bias


def _group_norm(call: NodeCall) -> Tensor:
    x, groups = call.tensor(0), call.attribute("num_groups")
    weight, bias = call.tensor(1), call.tensor(2)
    if call.opset < 21:  # one number for each group
        weight, bias = (one.repeat_interleave(x.shape[1] // groups) for one in (weight, bias))
    return F.group_norm(x, groups, weight, bias, call.attribute("epsilon", 1e-5))


def _logsumexp(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim)


def _over_places(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[NodeCall], Tensor]:
    """``function`` of all places of each channel of (N, C, ...), which stay axes of one place."""

    def run(call: NodeCall) -> Tensor:
        x = call.tensor(0)
        return function(x, list(range(2, x.dim())), True)

    return run


REDUCTIONS: dict[str, Callable[[NodeCall], PyObject]] = {
    "ReduceSum": _reduce(torch.sum), "ReduceMean": _reduce(_mean), "ReduceProd": _reduce(_prod),
    "ReduceMax": _reduce(_extreme(torch.amax, -torch.inf)), "ReduceMin": _reduce(_extreme(torch.amin, torch.inf)),
    "ReduceLogSumExp": _reduce(_logsumexp),
    "ReduceL2": _reduce(lambda x, axes, keep: _in_float(x).square().sum(axes, keep).sqrt()),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: _in_float(x).square().sum(axes, keep)),
    "GlobalAveragePool": _over_places(_mean), "GlobalMaxPool": _over_places(_extreme(torch.amax, -torch.inf)),
    "ArgMax": _arg(torch.argmax), "ArgMin": _arg(torch.argmin), "TopK": _top_k,
    "Softmax": _softmax(F.softmax), "LogSoftmax": _softmax(F.log_softmax), "CumSum": _cumsum,
    "BatchNormalization": _batch_norm, "InstanceNormalization": _instance_norm, "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm, "SimplifiedLayerNormalization": _rms_norm,
}  # fmt: skip

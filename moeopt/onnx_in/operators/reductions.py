"""Sums, means, norms, softmax, top-k: what looks along an axis."""

from __future__ import annotations

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
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return x
        axes = list(axes) if axes else list(range(x.dim()))
        reduced: Tensor = function(x, axes, bool(call.attribute("keepdims", 1)))
        return reduced.to(x.dtype)

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
    (k,) = call.numbers(1, "k")
    values, ids = torch.topk(
        call.tensor(0),
        k,
        call.attribute("axis", -1),
        bool(call.attribute("largest", 1)),
        bool(call.attribute("sorted", 1)),
    )
    return values, ids


def _softmax(function: Callable[..., Tensor]) -> Callable[[NodeCall], Tensor]:
    def run(call: NodeCall) -> Tensor:
        return function(call.tensor(0), dim=call.attribute("axis", -1))

    return run


def _cumsum(call: NodeCall) -> Tensor:
    (axis,) = call.numbers(1, "the axis")
    x = call.tensor(0)
    if call.attribute("reverse", 0):
        raise Declined(f"{call.node} sums backwards, which the interpreter does not read")
    summed = x.cumsum(axis).to(x.dtype)
    return summed - x if call.attribute("exclusive", 0) else summed


def _layer_norm(call: NodeCall) -> Tensor:
    if call.outputs > 1:
        raise Declined(f"{call.node} also gives its mean, which the interpreter does not")
    x, axis = call.tensor(0), call.attribute("axis", -1)
    shape = x.shape[axis % x.dim() :]
    return F.layer_norm(x, shape, call.tensor(1), call.optional(2), call.attribute("epsilon", 1e-5))


def _rms_norm(call: NodeCall) -> Tensor:
    if call.outputs > 1:
        raise Declined(f"{call.node} also gives its inverse deviation, which the interpreter does not")
    x, axis = call.tensor(0), call.attribute("axis", -1)
    dims = list(range(axis % x.dim(), x.dim()))
    scaled = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + call.attribute("epsilon", 1e-5))
    return scaled * call.tensor(1)


def _logsumexp(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim)


REDUCTIONS: dict[str, Callable[[NodeCall], PyObject]] = {
    "ReduceSum": _reduce(torch.sum), "ReduceMean": _reduce(torch.mean), "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin), "ReduceProd": _reduce(_prod), "ReduceLogSumExp": _reduce(_logsumexp),
    "ReduceL2": _reduce(lambda x, axes, keep: (x * x).sum(axes, keep).sqrt()),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: (x * x).sum(axes, keep)),
    "ArgMax": _arg(torch.argmax), "ArgMin": _arg(torch.argmin), "TopK": _top_k,
    "Softmax": _softmax(F.softmax), "LogSoftmax": _softmax(F.log_softmax), "CumSum": _cumsum,
    "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm, "SimplifiedLayerNormalization": _rms_norm,
}  # fmt: skip

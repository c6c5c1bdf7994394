"""Ops of float64 tensors whose numbers ONNX keeps as attributes, which are float32: written out in other ops before.

An epsilon of 1e-5, or a slope of 0.01, is 3e-8 off as an attribute, which float32 does not see and float64 does. In the
ops that are written here instead, each number is a float64 constant beside its tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeopt.patches import quicker_decomposition
from moeopt.value_types import PyObject

aten = torch.ops.aten


def attributes_written_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with such ops as others of the same numbers; itself where there is none."""
    table = {op: _of_float64(form) for op, form in _forms().items()} | {
        aten.full.default: full,
        aten.arange.start_step: arange,
    }
    if not any(node.target in table and _is_float64(node.meta.get("val")) for node in program.graph.nodes):
        return program
    with quicker_decomposition():
        decomposed: torch.export.ExportedProgram = program.run_decompositions(table)
    return decomposed


def _is_float64(value: PyObject) -> bool:
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(first, Tensor) and first.dtype == torch.float64


def _of_float64(form: Callable[..., Any]) -> Callable[..., Any]:
    """``form`` for float64 tensors, and the op itself for others."""

    @functools.wraps(form)
    def chosen(x: Tensor, *args: PyObject, **kwargs: PyObject) -> PyObject:
        return form(x, *args, **kwargs) if x.dtype == torch.float64 else NotImplemented

    return chosen


def _forms() -> dict[Any, Callable[..., Any]]:
    known = torch._decomp.get_decompositions(
        [
            aten.leaky_relu, aten.elu, aten.celu, aten.selu, aten.hardtanh, aten.hardsigmoid, aten.hardswish,
            aten.softplus, aten.mish, aten.gelu, aten.native_group_norm,
        ]
    )  # fmt: skip
    return known | {
        aten.layer_norm.default: layer_norm,
        aten.masked_fill.Scalar: lambda x, mask, value: torch.where(mask, torch.ones_like(x) * value, x),
        aten.full_like.default: lambda x, value, **options: torch.ones_like(x, **options) * value,
        aten.new_full.default: lambda x, size, value, **options: x.new_ones(size, **options) * value,
        aten.addcmul.default: lambda x, a, b, *, value=1: x + a * b * value,
        aten.add.Tensor: _times_alpha(torch.add),
        aten.sub.Tensor: _times_alpha(torch.sub),
        aten.addmm.default: lambda x, a, b, *, beta=1, alpha=1: x * beta + (a @ b) * alpha,
        aten.baddbmm.default: lambda x, a, b, *, beta=1, alpha=1: x * beta + torch.bmm(a, b) * alpha,
    }


def _times_alpha(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def form(x: Tensor, other: PyObject, *, alpha: float = 1) -> PyObject:
        return NotImplemented if alpha == 1 else op(x, other * alpha)

    return form


def full(size: list[int], value: float, *, dtype: torch.dtype | None = None, **options: PyObject) -> PyObject:
    """``torch.full``, as a product: the exporter makes a float32 constant of its number."""
    return torch.ones(size, dtype=dtype, **options) * value if dtype == torch.float64 else NotImplemented


def arange(
    start: float, end: float, step: float = 1, *, dtype: torch.dtype | None = None, **options: PyObject
) -> PyObject:
    """``torch.arange`` of numbers with fractions: the exporter adds float32 steps."""
    if dtype != torch.float64 or all(float(n).is_integer() for n in (start, end, step)):
        return NotImplemented
    count = torch.arange(math.ceil((end - start) / step), **options)
    return count.to(torch.float64) * step + start


def layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: PyObject,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axes, which ``shape`` counts."""
    dims = list(range(x.dim() - len(shape), x.dim()))
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred * centred).mean(dims, keepdim=True).add(eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

"""Which part of a Parameter each expert's matrix or vector is, as an index that reads it as a view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef
from moeopt.value_types import PyObject

WholeTensor = tuple[int, bool] | None
"""The number of a Parameter, and whether it is read turned; None for a part that is absent."""
WholeParts = tuple[list[list[WholeTensor]], list[WholeTensor], list[list[WholeTensor]], list[WholeTensor]]
"""Of w_in, w_out, b_in and b_out, a :data:`WholeTensor` for each expert."""


@dataclass(frozen=True)
class BasicIndex:
    """A matrix as a basic index of its Parameter, which tracers follow better than ``as_strided``."""

    at: tuple[Any, ...]
    whole: bool
    transposed: bool


IRREGULAR = object()


def region(tensor: Tensor, ref: MatrixRef) -> Tensor:
    """The (M, K) region of ``tensor`` at ``ref``, as a view."""
    _, dk, dm = ref.offset_and_strides(tensor.stride())
    return from_origin(tensor, ref.origin).as_strided((ref.m, ref.k), (dm, dk))


def region_of(ref: MatrixRef, layout: str, shape: tuple[int, ...]) -> PyObject:
    """``ref`` as a :class:`BasicIndex`; ``IRREGULAR`` where K or M does not run along one axis."""
    along_k = [(d, s) for d, s in enumerate(ref.dk) if s]
    along_m = [(d, s) for d, s in enumerate(ref.dm) if s]
    if len(along_k) != 1 or len(along_m) != 1 or along_k[0][0] == along_m[0][0]:
        return IRREGULAR
    (k_axis, k_step), (m_axis, m_step) = along_k[0], along_m[0]
    if k_step < 0 or m_step < 0:
        return IRREGULAR
    at: list[Any] = list(ref.origin)
    for axis, step, count in ((k_axis, k_step, ref.k), (m_axis, m_step, ref.m)):
        first = ref.origin[axis]
        at[axis] = slice(first, first + (count - 1) * step + 1, step)
    whole = len(shape) == 2 and all(a == slice(0, n, 1) for a, n in zip(at, shape, strict=True))
    return BasicIndex(tuple(at), whole, (m_axis > k_axis) == (layout == "oi"))


def from_origin(tensor: Tensor, origin: tuple[int, ...]) -> Tensor:
    """A view from the element ``origin`` on, where ``as_strided`` begins: torch.compile knows no ``storage_offset()``.

    The view holds all that a stack from there reads, so gradients reach every expert.
    """
    return tensor[tuple([slice(o, None) for o in origin])] if any(origin) else tensor


def whole_parts(
    experts: list[ExpertRef], layouts: tuple[str, str], shapes: Mapping[str, torch.Size]
) -> WholeParts | tuple[()]:
    """Where each part of every expert lies, if each is a whole Parameter; () if one is a part of one.

    Args:
        layouts: how w_in and w_out are handed out.
        shapes: of every Parameter, by its path; their order gives the numbers.
    """
    numbers = {path: number for number, path in enumerate(shapes)}
    irregular = False

    def at(ref: MatrixRef | VectorRef | None, layout: str = "") -> WholeTensor:
        nonlocal irregular
        if ref is None:
            return None
        if isinstance(ref, VectorRef):
            irregular |= not (ref.dm == (1,) and shapes[ref.path] == (ref.m,))
            return numbers[ref.path], False
        found = region_of(ref, layout, shapes[ref.path])
        if found is IRREGULAR or not found.whole:
            irregular = True
            return None
        return numbers[ref.path], found.transposed

    w_in = [[at(part, layouts[0]) for part in parts] for parts in zip(*(r.w_in for r in experts), strict=True)]
    b_in = [[at(part) for part in parts] for parts in zip(*(r.b_in for r in experts), strict=True)]
    w_out, b_out = [at(r.w_out, layouts[1]) for r in experts], [at(r.b_out) for r in experts]
    return () if irregular else (w_in, w_out, b_in, b_out)

"""Where a loaded model holds a matrix of its checkpoint: told by the numbers in names, by sizes, and by values.

    experts.3.up_proj (I, H)                in experts.gate_up_proj (E, 2I, H): [3], a half, or every second row
    experts.gate_up_proj[3] (2I, H)         in experts.gate_up_proj (E, H, 2I): [3], transposed
    self_attn.q_proj (N, K)                 in self_attn.q_proj.weight

Which half is up and which gate, values say: the nearest place is where the matrix is. Shape legend: N out, K in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.published.stored_matrix import StoredMatrix

_ROWS = 64
"""Rows of one sample; a matrix of at most eight of them is compared whole."""


@dataclass(frozen=True, eq=False)
class LoadedMatrix:
    """A part of a Parameter that holds a matrix of the checkpoint.

    Args:
        parameter: its name.
        place: which part, in words: "" for all of it.
        values: a view, (N, K).
        distance: from the checkpoint's weights, relative to their size, on the rows that were compared.
        same: whether each of these weights is the checkpoint's, but for roundings to the Parameter's dtype.
    """

    parameter: str
    place: str
    values: Tensor
    distance: float
    same: bool


def same_weights(values: Tensor, exact: Tensor, format: WeightFormat) -> bool:
    """Whether ``values`` are ``exact`` (float64), but for two roundings to their own dtype or to that of the scales.

    A loader may round a scale and a product, and do so in the dtype of the scales before it casts.
    """
    infos = [torch.finfo(d) for d in (values.dtype, format.scale_dtype) if d.is_floating_point]
    eps, tiny = (max(getattr(i, name) for i in infos) for name in ("eps", "smallest_normal"))
    apart = (values.double() - exact).abs()
    return bool((apart <= 2 * eps * exact.abs() + tiny * eps).all())


class LoadedParameters:
    """The floating Parameters and buffers of a model, by the numbers in their names."""

    def __init__(self, model: nn.Module) -> None:
        self._by_numbers: dict[tuple[int, ...], list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter):
                if tensor.dim() in (2, 3) and tensor.dtype.itemsize > 1:
                    self._by_numbers[numbers_of(name)].append((name, tensor.detach()))

    def find(self, matrix: StoredMatrix, weight: QuantizedWeight) -> LoadedMatrix | None:
        """Where ``matrix`` is held; None where no Parameter of its layer has a part of its sizes."""
        best: LoadedMatrix | None = None
        samples = [(at, weight.rows(*at, torch.float64)) for at in _samples(matrix.shape[0])]
        size = sum(float(rows.square().sum()) for _, rows in samples) ** 0.5
        for name, place, values in self._places(matrix):
            apart = sum(float((values[a:b].double() - rows).square().sum()) for (a, b), rows in samples) ** 0.5
            distance = apart / size if size else float(apart > 0)
            if best is None or distance < best.distance:
                same = all(same_weights(values[a:b], rows, matrix.format) for (a, b), rows in samples)
                best = LoadedMatrix(name, place, values, distance, same)
        return best

    def _places(self, matrix: StoredMatrix) -> Iterator[tuple[str, str, Tensor]]:
        numbers, end = numbers_of(matrix.name), matrix.name.rsplit(".", 1)[-1]
        alone = [
            (n, t) for n, t in self._by_numbers[numbers] if t.dim() == 2 and end in n.removesuffix(".weight").split(".")
        ]
        if matrix.expert is None:
            if alone:
                yield from ((name, "", t) for name, t in alone for t in _either_way(t, matrix.shape))
                return
            numbers, expert = numbers[:-1], numbers[-1] if numbers else None
        else:
            expert = matrix.expert
        for name, tensor in self._by_numbers[numbers]:
            if tensor.dim() == 3 and expert is not None and expert < len(tensor):
                yield from ((name, f"[{expert}]{part}", t) for part, t in _parts(tensor[expert], matrix.shape))


def numbers_of(name: str) -> tuple[int, ...]:
    """The numbers in a dotted name, in order: of the layer, of the expert."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def kind_of(name: str) -> str:
    """A name without its numbers: what is alike in all layers and experts."""
    return re.sub(r"\d+", "*", name)


def _either_way(tensor: Tensor, shape: tuple[int, int]) -> Iterator[Tensor]:
    if tensor.shape == shape:
        yield tensor
    if tensor.shape == shape[::-1]:
        yield tensor.t()


def _parts(tensor: Tensor, shape: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """The parts of a 2-D tensor, as it lies or transposed, that are matrices of this shape."""
    N, K = shape
    for w in (tensor, tensor.t()):
        if w.shape == (N, K):
            yield "", w
        elif w.shape == (2 * N, K):
            yield ", first half", w[:N]
            yield ", second half", w[N:]
            yield ", even rows", w[::2]
            yield ", odd rows", w[1::2]


def _samples(rows: int) -> list[tuple[int, int]]:
    if rows <= 8 * _ROWS:
        return [(0, rows)]
    step = (rows - _ROWS) / 7
    return [(round(i * step), round(i * step) + _ROWS) for i in range(8)]

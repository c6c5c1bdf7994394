"""A row function over codes as the grouped op on codes: its matrices, and the function between them.

    x @ dequantize(slots)  ..  ==  experts(x; QuantizedExpertWeights of views of the slots)

Each operand of a product that depends on slots alone, and is computed, is a matrix of codes (``codes_in_slots``). With
a Parameter in the place of each, the function is a dense FFN, and is read as one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.tape import record
from moeopt.errors import CaptureError, Declined
from moeopt.ir.coded_function import CodedFunction, CodedMatrix, SlotPart
from moeopt.ir.row_function import CODES, GETITEM, RowBody, RowCount, RowFunction, Value
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import MatrixRef, PartRef, VectorRef
from moeopt.recognise.codes_in_slots import read_codes
from moeopt.recognise.dense_ffn import DenseFFN, recognize_dense
from moeopt.recognise.ffn_candidates import find_candidates
from moeopt.recognise.gemm_sites import find_sites
from moeopt.recognise.scales_after import scales_first
from moeopt.value_types import PyObject

_PRODUCTS = ("mm", "addmm", "linear")
_ROWS = 5
"""Rows of the recorded call."""


@functools.lru_cache(maxsize=64)
def coded_function(spec: RowFunction) -> CodedFunction | None:
    """``spec`` as the grouped op on codes; None where it is no such function."""
    body = scales_first(spec.body)
    if not any(dtype in CODES for dtype, _ in body.slots):
        return None
    operands = _operands(body)
    if len(operands) not in (2, 3):
        return None
    try:
        return _read(spec, body, operands)
    except (Declined, CaptureError):
        return None


def _read(spec: RowFunction, body: RowBody, operands: list[int]) -> CodedFunction | None:
    floats = _Floats(body, operands)
    tape = record(floats.eval(), (torch.randn(_ROWS, body.features, dtype=body.dtype),), made=True)
    candidates = [c for c in find_candidates(tape, find_sites(tape)) if not c.merged]
    if len(candidates) != 1:
        return None
    ffn = recognize_dense(tape, candidates[0])
    if ffn.x not in tape.args or ffn.out is not tape.output or (ffn.axis_in, ffn.axis_out) != (1, 1):
        return None
    matrices = [_matrix(body, floats, ref) for ref in (*ffn.weights.w_in, ffn.weights.w_out)]
    if any(m is None for m in matrices) or len(matrices) != len(operands):
        return None
    biases = [None if b is None else _bias(body, b) for b in (*ffn.weights.b_in, ffn.weights.b_out)]
    *w_in, w_out = [m for m in matrices if m is not None]
    return CodedFunction(_spec(spec, ffn), tuple(w_in), w_out, tuple(biases[:-1]), biases[-1], body.dtype)


def _spec(spec: RowFunction, ffn: DenseFFN) -> ExpertsSpec:
    return dataclasses.replace(
        ffn.spec, w_in_layout="oi", w_out_layout="oi", weight_on=spec.weight_on, out_of_range=spec.out_of_range,
        combine=spec.combine, accum_dtype=spec.accum_dtype, out_dtype=spec.out_dtype,
    )  # fmt: skip


def _operands(body: RowBody) -> list[int]:
    """The values that rows are multiplied with, and that are computed from slots alone."""
    first = 1 + len(body.slots)
    of_rows = [True] + [False] * len(body.slots)
    found = []
    for number, (op, args, kwargs) in enumerate(body.nodes):
        read = _read_by(args, kwargs)
        of_rows.append(any(of_rows[v] for v in read))
        if op == GETITEM or op._schema.name.split("::")[1] not in _PRODUCTS or not of_rows[first + number]:
            continue
        at = 1 if op._schema.name != "aten::addmm" else 2
        if len(args) > at and isinstance(args[at], Value) and not of_rows[args[at]]:
            found.append(int(args[at]))
    return list(dict.fromkeys(v for v in found if v >= first))


def _read_by(args: Sequence[PyObject], kwargs: Mapping[str, PyObject]) -> list[int]:
    found: list[int] = []
    stack = [*args, *kwargs.values()]
    while stack:
        one = stack.pop()
        if isinstance(one, Value):
            found.append(int(one))
        elif isinstance(one, (list, tuple)):
            stack += one
    return found


def _needed(body: RowBody, out: int, stop: set[int]) -> list[int]:
    """The numbers of the nodes that ``out`` is computed with, in order, those before a value of ``stop`` left out."""
    first, found, stack = 1 + len(body.slots), set[int](), [out]
    while stack:
        value = stack.pop()
        if value >= first and value not in stop and value not in found:
            found.add(value)
            _, args, kwargs = body.nodes[value - first]
            stack += _read_by(args, kwargs)
    return sorted(found)


def _run(body: RowBody, nodes: list[int], given: dict[int, Tensor], rows: int) -> dict[int, Any]:
    """The values of ``nodes``, and those that are ``given``."""
    values: dict[int, Any] = dict(given)

    def word(arg: PyObject) -> PyObject:
        if isinstance(arg, Value):
            return values[int(arg)]
        if isinstance(arg, RowCount):
            return rows
        return [word(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    for number in nodes:
        op, args, kwargs = body.nodes[number - 1 - len(body.slots)]
        if op == GETITEM:
            values[number] = word(args[0])[args[1]]
        else:
            values[number] = op(*map(word, args), **{k: word(v) for k, v in kwargs.items()})
    return values


class _Floats(nn.Module):
    """The row function with a float Parameter in the place of each matrix of codes, and of each slot that it reads."""

    def __init__(self, body: RowBody, operands: list[int]) -> None:
        super().__init__()
        self.body, self.nodes = body, _needed(body, body.out, set(operands))
        self.shapes: dict[int, tuple[int, int]] = {}
        read = {v for n in self.nodes for v in _read_by(*body.nodes[n - 1 - len(body.slots)][1:])}
        rng = torch.Generator().manual_seed(0)
        for value in operands:
            like = matrix_of(body, value, {s: torch.zeros(shape, dtype=d) for s, (d, shape) in _slots(body, value)})
            self.shapes[value] = tuple(like.shape)  # type: ignore[assignment]
            self._hold(value, torch.randn(like.shape, generator=rng).div(like.shape[-1] ** 0.5).to(like.dtype))
        for slot, (dtype, shape) in enumerate(body.slots):
            if 1 + slot in read:
                self._hold(1 + slot, torch.randn(shape, generator=rng).to(dtype))

    def _hold(self, value: int, tensor: Tensor) -> None:
        self.register_parameter(f"v{value}", nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        given = {0: x, **{int(name[1:]): p for name, p in self._parameters.items() if p is not None}}
        found: Tensor = _run(self.body, self.nodes, given, x.shape[0])[self.body.out]
        return found


def _slots(body: RowBody, value: int) -> list[tuple[int, tuple[torch.dtype, tuple[int, ...]]]]:
    """The slots that ``value`` is computed from, by number."""
    first = 1 + len(body.slots)
    read = {v for n in _needed(body, value, set()) for v in _read_by(*body.nodes[n - first][1:])}
    return [(v - 1, body.slots[v - 1]) for v in sorted(read) if 1 <= v < first]


def matrix_of(body: RowBody, value: int, slots: dict[int, Tensor]) -> Tensor:
    """The ``value`` that is computed of ``slots`` alone."""
    given = {1 + slot: tensor for slot, tensor in slots.items()}
    found: Tensor = _run(body, _needed(body, value, set()), given, 0)[value]
    return found


def _matrix(body: RowBody, floats: _Floats, ref: MatrixRef) -> CodedMatrix | None:
    """The codes of the matrix that is all of a Parameter of ``floats``."""
    value = int(ref.path[1:])
    shape = floats.shapes.get(value)
    if shape is None or ref.k * ref.m != shape[0] * shape[1] or any(ref.origin):
        return None
    turned = ref.dk == (1, 0)  # (in, out)
    if (ref.dk, ref.dm) not in (((1, 0), (0, 1)), ((0, 1), (1, 0))):
        return None

    def made(slots: dict[int, Tensor]) -> Tensor:
        found = matrix_of(body, value, slots)
        return found.t() if turned else found

    return read_codes(made, dict(_slots(body, value)), (ref.m, ref.k))


def _bias(body: RowBody, ref: VectorRef) -> SlotPart:
    """The view of a slot that a bias is."""
    slot = int(ref.path[1:]) - 1
    return SlotPart(slot, PartRef("", ref.origin, (ref.dm,), (ref.m,)), (ref.m,), body.slots[slot][0])

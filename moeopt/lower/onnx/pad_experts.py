"""Experts of unequal size as experts of one size: neurons of zeros fill the smaller ones.

    W_in rows 0, b_in 0, W_out columns 0:  such a neuron is act(0) * 0 in the sum, which is 0

An engine writes its own weights, so this costs no second copy of the model's, only the zeros: fewer than E
neurons where a dense FFN of I neurons is split into E groups. Where all gates are packed before all ups, each half is
filled by itself. Shape legend: E experts, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.value_types import OnnxValue


class PaddedExperts:
    """``bank`` with every expert of ``inner`` neurons, whose rows of W_in are those of one neuron after the other."""

    def __init__(self, bank: ExpertWeights, spec: ExpertsSpec, inner: int) -> None:
        self._bank, self._inner = bank, inner
        self._in_axis, self._out_axis = int(spec.w_in_layout == "io"), int(spec.w_out_layout == "oi")
        self._rows = 2 * inner if spec.rows.startswith("interleaved") else inner
        self._halves = 2 if spec.rows in ("gate|up", "up|gate") else 1
        self.num_experts = bank.num_experts

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        return tuple([self._fill_in(w, self._in_axis) for w in self._bank.w_in(e)])

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        return tuple([None if b is None else self._fill_in(b, 0) for b in self._bank.b_in(e)])

    def _fill_in(self, part: Tensor, axis: int) -> Tensor:
        return torch.cat([_fill(half, axis, self._rows) for half in part.chunk(self._halves, axis)], axis)

    def w_out(self, e: int) -> Tensor:
        return _fill(self._bank.w_out(e), self._out_axis, self._inner)

    def b_out(self, e: int) -> Tensor | None:
        return self._bank.b_out(e)

    def norm(self, e: int) -> Tensor | None:
        return self._bank.norm(e)

    def stacked(self) -> None:
        return None


def pad_experts(bank: ExpertWeights, spec: ExpertsSpec) -> ExpertWeights:
    """``bank``, filled up where its experts differ in size."""
    if bank.stacked() is not None or isinstance(bank, QuantizedExpertWeights):  # codes are of equal size
        return bank
    axis = int(spec.w_out_layout == "oi")
    sizes = {bank.w_out(e).shape[axis] for e in range(bank.num_experts)}
    return PaddedExperts(bank, spec, max(sizes)) if len(sizes) > 1 else bank


def bank_of(bank: OnnxValue, spec: ExpertsSpec | RowFunction) -> OnnxValue:
    """What a site reads: the bank of equal experts; of a function of a row the slots, which are alike already."""
    if isinstance(spec, RowFunction):
        return bank
    if isinstance(bank, QuantizedExpertWeights):
        return bank.handed_out((spec.w_in_layout, spec.w_out_layout), bank.dtype)
    return pad_experts(bank, spec)


def _fill(part: Tensor, axis: int, size: int) -> Tensor:
    """``part`` with zeros up to ``size`` along ``axis``."""
    more = size - part.shape[axis]
    return F.pad(part, (0, 0) * (part.dim() - 1 - axis) + (0, more)) if more else part

"""Experts whose function of a row makes its matrices of codes: the grouped function, and where the codes lie in slots.

    RowFunction over slots  ==  ExpertsSpec over QuantizedExpertWeights of views of the same slots

Shape legend: N out, K in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import WeightFormat
from moeopt.ir.weight_refs import PartRef


@dataclass(frozen=True)
class SlotPart:
    """A view of the tensor in one slot.

    Args:
        slot: the number of the slot.
        part: which region of the tensor; its ``path`` is empty.
        shape: what it is expanded to.
        dtype: the dtype that it is handed out in.
        bits: whether the bits of the tensor are codes of ``dtype``, in whatever dtype a module stores them; ``part`` is
            a region of the codes then.
    """

    slot: int
    part: PartRef
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        """The region of ``tensor``: a view, but where dtypes differ or words do not lie side by side."""
        if self.bits and tensor.dtype is not self.dtype:
            tensor = (tensor if tensor.dtype.itemsize == 1 else tensor.contiguous()).view(self.dtype)
        found = self.part.read(tensor)
        return (found if found.shape == self.shape else found.expand(self.shape)).to(self.dtype)


@dataclass(frozen=True)
class CodedMatrix:
    """One (N, K) matrix of an expert: codes, scales and, where ``format`` has them, zero points."""

    format: WeightFormat
    shape: tuple[int, int]
    codes: SlotPart
    scales: SlotPart
    zeros: SlotPart | None = None

    @property
    def in_rows(self) -> bool:
        """Whether the codes of a row, and its scales, lie side by side where the slots are contiguous."""
        return all(_side_by_side(p.part) for p in (self.codes, self.scales))

    @property
    def parts(self) -> list[SlotPart]:
        """The views in the order of ``MatrixFormat.parts``."""
        return [p for p in (self.codes, self.scales, self.zeros) if p is not None]


def _side_by_side(part: PartRef) -> bool:
    step = part.steps[1]
    return part.shape[1] == 1 or next((a, s) for a, s in enumerate(step) if s) == (_last(part), 1)


def _last(part: PartRef) -> int:
    """The last axis of the tensor along which it has more than one number in the region."""
    return max(a for step in part.steps for a, s in enumerate(step) if s)


@dataclass(frozen=True)
class CodedFunction:
    """What a row function over codes computes, as the grouped op has it.

    Args:
        spec: the function.
        w_in, w_out: the matrices, one or two (gate, up) first ones.
        b_in, b_out: biases, which are floats.
        dtype: of the rows that the matrices multiply.
    """

    spec: ExpertsSpec
    w_in: tuple[CodedMatrix, ...]
    w_out: CodedMatrix
    b_in: tuple[SlotPart | None, ...]
    b_out: SlotPart | None
    dtype: torch.dtype

    @property
    def matrices(self) -> tuple[CodedMatrix, ...]:
        """W_in, then W_out."""
        return (*self.w_in, self.w_out)

    @property
    def scale_slots(self) -> list[int]:
        """The slots of scales: floats, to which gradients could flow."""
        return sorted({m.scales.slot for m in self.matrices})

    def bank_format(self, experts: int) -> BankFormat:
        """The formats of so many of these experts."""
        *ins, out = [MatrixFormat(m.format, m.shape) for m in self.matrices]
        return BankFormat(experts, tuple(ins), out)

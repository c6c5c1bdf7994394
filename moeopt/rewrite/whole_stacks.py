"""Stacked weights that are whole Parameters, handed out as these: where gradients are recorded each view is a node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeopt.ir.weight_refs import ExpertRef
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.value_types import PyObject


class WholeStacks:
    """Which Parameter each stacked tensor is, while the Parameters have the strides that they had.

    Args:
        made: the stacked weights.
        tensors: the Parameters that they are views of, not all of them whole ones maybe.
        at: of each stacked tensor the number of its Parameter; two that share memory have a gradient each.
    """

    def __init__(self, made: StackedExpertWeights, tensors: Sequence[Tensor], at: Sequence[int | None]) -> None:
        self._strides = [t.stride() for t in tensors]
        parts = (*made.w_in_s, made.w_out_s, *made.b_in_s, made.b_out_s)
        self._pairs, self._at = len(made.w_in_s), at
        self._whole = all(t is None or _lies(t) == _lies(tensors[n or 0]) for t, n in zip(parts, at, strict=True))

    def knows(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it was made of Parameters with these strides; their shapes are the same."""
        return [t.stride() for t in tensors] == self._strides

    def stacked(self, tensors: Sequence[Tensor]) -> StackedExpertWeights | None:
        """The Parameters as stacked weights; None where a stack is a part of one, or lies in another order."""
        if not self._whole:
            return None
        found: list[PyObject] = [None if at is None else tensors[at] for at in self._at]
        n = self._pairs
        return StackedExpertWeights(found[:n], found[n], found[n + 1 : -1], found[-1])


def _lies(t: Tensor) -> object:
    return t.data_ptr(), t.shape, t.stride()


def numbers_of(expert: ExpertRef, paths: list[str]) -> list[int | None]:
    """The number among ``paths`` of each Parameter that the parts of ``expert`` are in, in the order of a stack's."""
    parts = (*expert.w_in, expert.w_out, *expert.b_in, expert.b_out)
    return [None if part is None else paths.index(part.path) for part in parts]


def detached(bank: StackedExpertWeights) -> StackedExpertWeights:
    """The same memory; a view keeps the Parameter alive that it is of, a detached one does not."""

    def one(t: Tensor | None) -> PyObject:
        return None if t is None else t.detach()

    return StackedExpertWeights(
        [one(t) for t in bank.w_in_s], one(bank.w_out_s), [one(t) for t in bank.b_in_s], one(bank.b_out_s)
    )

"""Stacked weights that are whole Parameters, handed out as these: where gradients are recorded each view is a node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.value_types import PyObject


class WholeStacks:
    """Which Parameter each stacked tensor is, while the Parameters have the strides that they had.

    Args:
        made: the stacked weights.
        tensors: the Parameters that they are views of, not all of them whole ones maybe.
    """

    def __init__(self, made: StackedExpertWeights, tensors: Sequence[Tensor]) -> None:
        self._strides = [t.stride() for t in tensors]
        lie = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
        parts = (*made.w_in_s, made.w_out_s, *made.b_in_s, made.b_out_s)
        places = [None if t is None else (t.data_ptr(), t.shape, t.stride()) for t in parts]
        self._pairs, self._whole = len(made.w_in_s), all(place is None or place in lie for place in places)
        self._at = [None if place is None else lie.index(place) for place in places] if self._whole else []

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


def detached(bank: StackedExpertWeights) -> StackedExpertWeights:
    """The same memory; a view keeps the Parameter alive that it is of, a detached one does not."""

    def one(t: Tensor | None) -> PyObject:
        return None if t is None else t.detach()

    return StackedExpertWeights(
        [one(t) for t in bank.w_in_s], one(bank.w_out_s), [one(t) for t in bank.b_in_s], one(bank.b_out_s)
    )

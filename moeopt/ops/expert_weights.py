"""Where the weights of E experts live: a bank is looked up one expert at a time, and never copies.

Shape legend: E experts, O rows of W (2I when gated, I when plain), H hidden, I intermediate.
``oi`` weights are (O, H) and (H, I); ``io`` weights are (H, O) and (I, H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

Biases = Sequence[Tensor | None]


def how_they_lie(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Of each tensor all that a kernel is told of it: what was worked out of tensors holds of all that lie as these."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg()) for t in tensors]


class ExpertWeights(Protocol):
    """The weights of ``num_experts`` experts, live: a lookup returns the tensor as it is now."""

    @property
    def num_experts(self) -> int:
        """How many experts the bank holds."""

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        """One 2-D tensor, or two (gate, up) when ``spec.rows == "separate"``."""

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        """The 1-D biases of :meth:`w_in`, one each; None where there is none."""

    def w_out(self, e: int) -> Tensor:
        """The 2-D output weight."""

    def b_out(self, e: int) -> Tensor | None:
        """The 1-D output bias, or None."""

    def norm(self, e: int) -> Tensor | None:
        """The 1-D RMSNorm weight after W_out, or None (a norm without a weight, or no norm)."""

    def stacked(self) -> StackedExpertWeights | None:
        """The same weights as whole stacked tensors if they are stored so, else None."""


class StackedExpertWeights:
    """A bank of tensors whose first dimension is the expert.

    Args:
        w_in: one tensor (E, O, H) or two (gate, up); the last two dimensions follow ``spec.w_in_layout``.
        w_out: (E, H, I) or (E, I, H), following ``spec.w_out_layout``.
        b_in: None, or one (E, O) tensor or None for each of ``w_in``.
        b_out: (E, H) or None.
        norm: (E, H) or None.

    Raises:
        UsageError: the tensors disagree on E, or ``b_in`` has more or fewer entries than ``w_in``.
    """

    def __init__(
        self,
        w_in: Sequence[Tensor],
        w_out: Tensor,
        b_in: Biases | None = None,
        b_out: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> None:
        self.w_in_s = tuple(w_in)
        self.w_out_s = w_out
        self.b_in_s: tuple[Tensor | None, ...] = tuple(b_in) if b_in else (None,) * len(self.w_in_s)
        self.b_out_s = b_out
        self.norm_s = norm
        self.num_experts: int = w_out.shape[0]
        self.known: PyObject = None  # what a kernel worked out of these tensors, and how they lay then
        _one_each("StackedExpertWeights", self.w_in_s, self.b_in_s)
        _same_length("StackedExpertWeights", self.num_experts, [*self.w_in_s, *self.b_in_s, b_out, norm])

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        return tuple([w[e] for w in self.w_in_s])

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        return tuple([None if b is None else b[e] for b in self.b_in_s])

    def w_out(self, e: int) -> Tensor:
        return self.w_out_s[e]

    def b_out(self, e: int) -> Tensor | None:
        return None if self.b_out_s is None else self.b_out_s[e]

    def norm(self, e: int) -> Tensor | None:
        return None if self.norm_s is None else self.norm_s[e]

    def stacked(self) -> StackedExpertWeights:
        return self


class ListedVectors:
    """The biases and norm weights of E experts, each None or a sequence with an entry for each expert.

    Attributes:
        b_in_l: for each of the first matrices its biases.
        b_out_l, norm_l: those of W_out, and of the norm after it.
    """

    b_in_l: tuple[Biases | None, ...]
    b_out_l: Biases | None
    norm_l: Biases | None

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        """Expert e's first biases, each (O,) or (I,)."""
        return tuple([None if bs is None else bs[e] for bs in self.b_in_l])

    def b_out(self, e: int) -> Tensor | None:
        """Expert e's second bias (H,)."""
        return None if self.b_out_l is None else self.b_out_l[e]

    def norm(self, e: int) -> Tensor | None:
        """Expert e's norm weight (H,)."""
        return None if self.norm_l is None else self.norm_l[e]


class ListExpertWeights(ListedVectors):
    """A bank of E separate tensors for each weight, as most users' models store them.

    Args:
        w_in: one list of E tensors, or two (all gates, all ups).
        w_out: E tensors.
        b_in: None, or for each of ``w_in`` a list of E tensors (None inside: that expert has no bias) or None.
        b_out, norm: E tensors (None inside: absent there), or None.

    Raises:
        UsageError: the lists differ in length, or ``b_in`` has more or fewer of them than ``w_in``.
    """

    def __init__(
        self,
        w_in: Sequence[Sequence[Tensor]],
        w_out: Sequence[Tensor],
        b_in: Sequence[Biases | None] | None = None,
        b_out: Biases | None = None,
        norm: Biases | None = None,
    ) -> None:
        self.w_in_l = tuple(w_in)
        self.w_out_l = w_out
        self.b_in_l = tuple(b_in) if b_in else (None,) * len(self.w_in_l)
        self.b_out_l = b_out
        self.norm_l = norm
        self.num_experts: int = len(w_out)
        _one_each("ListExpertWeights", self.w_in_l, self.b_in_l)
        _same_length("ListExpertWeights", self.num_experts, [*self.w_in_l, *self.b_in_l, b_out, norm])

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        return tuple([ws[e] for ws in self.w_in_l])

    def w_out(self, e: int) -> Tensor:
        return self.w_out_l[e]

    def stacked(self) -> None:
        return None


def _one_each(what: str, w_in: Sequence[object], b_in: Sequence[object]) -> None:
    if len(w_in) != len(b_in):  # a kernel is told where each lies by its place among all of them
        raise UsageError(
            f"{what}: w_in has {len(w_in)} part{'s' * (len(w_in) != 1)} and b_in {len(b_in)}; give each part of w_in "
            "its biases, or None"
        )


def _same_length(what: str, num_experts: int, parts: Sequence[Tensor | Biases | None]) -> None:
    for part in parts:
        if part is not None and len(part) != num_experts:
            raise UsageError(
                f"{what}: W_out holds {num_experts} experts and another weight {len(part)}; "
                "give every weight one entry per expert"
            )

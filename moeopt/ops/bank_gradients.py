"""The weights of a bank as a backward pass reads them, one part of every expert at a time, and their gradients.

Each part hands its matrices out as (out, in), however they lie, and makes a gradient in the order in which they lie:
that one is taken for ``.grad`` as it is.

Shape legend: E experts, M rows of one expert, O and I the width out and in of a part.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights


class BankPart(Protocol):
    """One matrix or vector of each expert, and the gradients of those that want one, as they grow."""

    def value(self, e: int) -> Tensor | None:
        """Expert e's, (O, I) or (O,); None where it has none."""

    def wanted(self, e: int) -> bool:
        """Whether expert e's wants a gradient."""

    def add(self, e: int, left_MO: Tensor, right_MI: Tensor) -> None:
        """Add ``left_MO.T @ right_MI`` to the gradient of expert e's matrix."""

    def add_vector(self, e: int, vector_O: Tensor) -> None:
        """Add to the gradient of expert e's vector."""


class BankParts(NamedTuple):
    """All parts of the bank of E experts; ``w_in`` and ``b_in`` are two where gate and up are."""

    experts: int
    w_in: Sequence[BankPart]
    b_in: Sequence[BankPart]
    w_out: BankPart
    b_out: BankPart


class StackedPart:
    """A part of E experts in one tensor.

    Args:
        stack: (E, ., .) or (E, .); None where no expert has it.
        wanted: whether it wants a gradient.
        turned: whether the matrices lie as (in, out).

    Attributes:
        total: the gradient, in which experts that nothing is added to have garbage until :meth:`finish`.
    """

    def __init__(self, stack: Tensor | None, wanted: bool, turned: bool = False) -> None:
        self._turned, self._values = turned, None
        self.total: Tensor | None = None
        if stack is None:
            return
        self._values = (stack.transpose(1, 2) if turned else stack).unbind(0)
        if wanted:
            self.total = torch.empty_like(stack, memory_format=torch.contiguous_format)
            self._totals = self.total.unbind(0)
            self._idle = set(range(len(self._totals)))

    def value(self, e: int) -> Tensor | None:
        return None if self._values is None else self._values[e]

    def wanted(self, e: int) -> bool:
        return self.total is not None

    def add(self, e: int, left_MO: Tensor, right_MI: Tensor) -> None:
        left, right = (right_MI, left_MO) if self._turned else (left_MO, right_MI)
        self._idle.remove(e)
        if self._totals[e].dtype is left.dtype:
            torch.mm(left.t(), right, out=self._totals[e])
        else:
            self._totals[e].copy_(torch.mm(left.t(), right))

    def add_vector(self, e: int, vector_O: Tensor) -> None:
        self._idle.remove(e)
        self._totals[e].copy_(vector_O)

    def finish(self) -> Tensor:
        """The gradient; zeros where nothing was added."""
        assert self.total is not None
        if len(self._idle) == len(self._totals):
            return self.total.zero_()
        for e in self._idle:
            self._totals[e].zero_()
        return self.total


class HeldAt(NamedTuple):
    """What stands for one of the tensors that were held, turned or not, where only its place is asked for."""

    number: int
    turned: bool = False

    def t(self) -> HeldAt:
        return HeldAt(self.number, not self.turned)


class ListedPart:
    """A part of E experts in separate tensors, some of them one tensor maybe, which then has the sum.

    Args:
        at: of each expert the number of its tensor, and whether that is (in, out); None where it has none.
        tensors: all of them.
        wanted: the numbers of those that want a gradient.
        totals: the gradients by number, for it to fill.
    """

    def __init__(
        self, at: Sequence[HeldAt | None], tensors: Sequence[Tensor], wanted: Collection[int],
        totals: MutableMapping[int, Tensor],
    ) -> None:  # fmt: skip
        self._at, self._tensors, self._wanted, self._totals = at, tensors, wanted, totals

    def value(self, e: int) -> Tensor | None:
        at = self._at[e]
        if at is None:
            return None
        return self._tensors[at.number].t() if at.turned else self._tensors[at.number]

    def wanted(self, e: int) -> bool:
        at = self._at[e]
        return at is not None and at.number in self._wanted

    def add(self, e: int, left_MO: Tensor, right_MI: Tensor) -> None:
        at = self._at[e]
        assert at is not None
        left, right = (right_MI, left_MO) if at.turned else (left_MO, right_MI)
        self._put(at.number, torch.mm(left.t(), right))

    def add_vector(self, e: int, vector_O: Tensor) -> None:
        at = self._at[e]
        assert at is not None
        self._put(at.number, vector_O)

    def _put(self, number: int, gradient: Tensor) -> None:
        gradient = gradient.to(self._tensors[number].dtype)
        known = self._totals.get(number)
        self._totals[number] = gradient if known is None else known.add_(gradient)


def listed_parts(
    bank: ExpertWeights, tensors: Sequence[Tensor], wanted: Collection[int], totals: MutableMapping[int, Tensor],
    spec: ExpertsSpec,
) -> BankParts:  # fmt: skip
    """The parts of a bank that hands out a :class:`HeldAt` in the place of each of ``tensors``."""
    every = range(bank.num_experts)

    def part(found: Sequence[HeldAt | None], layout: str = "oi") -> ListedPart:
        at = [None if one is None else one.t() if layout == "io" else one for one in found]
        return ListedPart(at, tensors, wanted, totals)

    pairs = range(2 if spec.rows == "separate" else 1)
    w_in, b_in = [bank.w_in(e) for e in every], [bank.b_in(e) for e in every]
    return BankParts(
        bank.num_experts,
        [part([one[i] for one in w_in], spec.w_in_layout) for i in pairs],  # type: ignore[misc]
        [part([one[i] for one in b_in]) for i in pairs],  # type: ignore[misc]
        part([bank.w_out(e) for e in every], spec.w_out_layout),  # type: ignore[misc]
        part([bank.b_out(e) for e in every]),  # type: ignore[misc]
    )


def parts_of_stacks(
    lists: Sequence[Sequence[Tensor]], wanted: Collection[int], spec: ExpertsSpec
) -> tuple[BankParts, dict[int, StackedPart]]:
    """The parts of a bank as the op takes stacked weights, and those that want a gradient by their numbers."""
    numbered = enumerate(t for part in lists[:4] for t in part)
    found = [[next(numbered) for _ in part] for part in lists[:4]]
    turned = spec.w_in_layout == "io", spec.w_out_layout == "io", False, False
    made = {
        n: StackedPart(stack if stack.numel() or stack.dim() > 1 else None, n in wanted, io)
        for part, io in zip(found, turned, strict=True)
        for n, stack in part
    }
    w_in, w_out, b_in, b_out = ([made[n] for n, _ in part] for part in found)
    absent = StackedPart(None, False)
    parts = BankParts(len(lists[1][0]), w_in, b_in or [absent] * len(w_in), w_out[0], b_out[0] if b_out else absent)
    return parts, {n: part for n, part in made.items() if n in wanted}


def parts_of_lists(
    lists: Sequence[Sequence[Tensor]], wanted: Collection[int], totals: MutableMapping[int, Tensor], spec: ExpertsSpec
) -> BankParts:
    """The same of E tensors for each part; ``totals`` is for it to fill."""
    tensors = [t for part in lists for t in part]
    numbers = iter(range(len(tensors)))
    placed = [
        [HeldAt(n) if t.numel() or t.dim() > 1 else None for t, n in zip(p, numbers, strict=False)] for p in lists
    ]
    E = len(placed[1])
    w_in, w_out, b_in, b_out = ([part[i : i + E] for i in range(0, len(part), E)] for part in placed[:4])
    absent = [[None] * E]
    bank = ListExpertWeights(w_in, w_out[0], b_in or absent * len(w_in), (b_out or absent)[0])  # type: ignore[arg-type]
    return listed_parts(bank, tensors, wanted, totals, spec)

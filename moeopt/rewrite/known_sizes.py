"""The sizes for which a block was verified whose Python computes with them: ``if 23 <= len(x) < 150 and len(x) % 4``.

No graph holds such a decision. What is known of the code is which numbers it compares a size with and by which it
divides one, so sizes between two of these numbers and of equal remainders are alike to it, and one of each such class
was verified. A size of which nothing more is known than that the code computes with it is alike to itself alone.

The sizes of a call are its free ones in the order of its tensors, each known once, and behind them their product.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Class = tuple[tuple[int, ...], ...]
_COUNTED = 1 << 16
"""Sizes that are gone through to count their classes; of more, as many are taken as there may be."""


@dataclass(frozen=True)
class SizeUses:
    """What a block's Python does with one of the sizes: compares it with ``limits`` (each lies between two sizes),
    divides it by ``divisors``, or something else (``exact``)."""

    limits: tuple[float, ...] = ()
    divisors: tuple[int, ...] = ()
    exact: bool = False

    def class_of(self, size: int) -> tuple[int, ...]:
        """Equal for sizes that are alike to the code."""
        if self.exact:
            return (int(size),)
        passed = 0
        for limit in self.limits:  # no bisection: torch.compile and exporters follow this, and make guards of it
            if size > limit:
                passed += 1
        return (passed, *(int(size % divisor) for divisor in self.divisors))

    def classes(self) -> int:
        """How many classes the sizes from 1 on have: below 4, three of the remainders by 8."""
        turn = math.lcm(*self.divisors)
        last = math.floor(max(self.limits, default=0)) + turn
        if last > _COUNTED:
            return (len(self.limits) + 1) * turn
        return len({self.class_of(size) for size in range(1, last + 1)})


@dataclass
class KnownSizes:
    """Which calls are like verified ones in their sizes.

    Attributes:
        places: (tensor, dimension) of each size.
        uses: of each size; of their product behind them, where there are two or more.
        verified: the classes of the calls that were verified.
        text: where the code computes with sizes.
    """

    places: tuple[tuple[int, int], ...]
    uses: tuple[SizeUses, ...]
    verified: set[Class] = field(default_factory=set)
    text: str = ""

    def class_of(self, sizes: Sequence[int]) -> Class:
        """That of a call with ``sizes``, without their product."""
        known = [*sizes, math.prod(sizes)] if len(sizes) > 1 else sizes
        return tuple(use.class_of(size) for use, size in zip(self.uses, known, strict=True))

    def holds(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether a call with tensors of these shapes is of a verified class."""
        sizes = [shapes[i][d] for i, d in self.places]
        if torch.compiler.is_compiling() and all(use.exact for use in self.uses):
            # a comparison is followed with the size left free; a size that is looked up is a graph of its own
            known = [[size for size, *_ in places] for places in self.verified]
            return any(all(map(operator.eq, sizes, one)) for one in known)
        return self.class_of(sizes) in self.verified

    def complete(self) -> bool:
        """Whether calls of every class were verified."""
        if any(use.exact for use in self.uses):
            return False
        return len(self.verified) == math.prod(use.classes() for use in self.uses)

    def refusal(self, shapes: Sequence[Sequence[int]]) -> str:
        """Why a call with tensors of these shapes was not verified; without its sizes in compiled code, which PyTorch
        would compile anew for each text."""
        sizes = "a size"
        if not torch.compiler.is_compiling():
            sizes = "size " + " and ".join(str(int(shapes[i][d])) for i, d in self.places)
        return f"it was called with {sizes}, and its code computes with sizes ({self.text}): this was not verified"

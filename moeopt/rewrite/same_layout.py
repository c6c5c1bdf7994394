"""A guard that all weights of a bank still have the same addresses and layouts: one generated comparison.

    layout = SameLayout(places, experts, check, arm)
    layout.look()       what a kernel derived from this layout, and the weights; derived anew once a weight moved

A small block of separate experts has one or two dozen weights and runs for a hundred microseconds; checking each weight
by itself takes fifteen of these. The comparison checks the same facts (``BankLayout``, ``Place``, ``Watch.expert``) and
holds no weight. Where it fails, weights are read one by one, which also tells what is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from moeopt.rewrite.bank_layout import BankLayout, OnePlace
from moeopt.rewrite.guard_expression import GuardExpression

MOST = 64
"""Weights of a bank above which ``BankLayout`` compares them in a few calls instead of a generated comparison."""
FEW = 24
"""Weights up to which comparing all takes less time than reading two or three experts."""
PATIENCE = 32
"""Calls until a bank in which a weight could not be read is tried again."""

Arm = Callable[[GuardExpression], None]
"""Adds the terms that hold while no expert changes."""
Remembered = tuple[dict[Any, Any], tuple[Tensor, ...]]
"""A table for a kernel to store what it derives from this layout, and all weights."""


class ReadablePlace(OnePlace, Protocol):
    """A place whose ``read`` raises where something differs from what was verified."""

    def read(self) -> Tensor:
        """The tensor as it is now."""


class SameLayout:
    """See the module's docstring.

    Args:
        places: where every weight is.
        experts: how many experts there are.
        check: raises where the expert of a number is not as it was verified.
        arm: adds what ``check`` asks of all experts; None where they have to be asked each time.
    """

    def __init__(
        self, places: Sequence[ReadablePlace], experts: int, check: Callable[[int], None], arm: Arm | None
    ) -> None:
        self._places, self._all, self._experts = places, BankLayout(places), experts
        self._check, self._arm = check, arm if len(places) <= MOST else None
        self._known: tuple[Callable[[], Any], dict[Any, Any]] | None = None  # replaced whole: threads may call
        self._wait = 0

    def look(self) -> Remembered | None:
        """None where a weight can't be told to lie anywhere; raises what ``check`` and a place raise."""
        known = self._known
        if known is not None:
            try:
                tensors = known[0]()
            except Exception:  # something was removed, or is of a kind that has no memory
                tensors = None
            if tensors:
                if self._arm is None:
                    self._ask()
                return known[1], tensors
        if self._wait > 0:
            self._wait -= 1
            return None
        return self._know()

    def _ask(self) -> None:
        for expert in range(self._experts):
            self._check(expert)

    def _know(self) -> Remembered | None:
        """Look at each weight, and remember how it lies."""
        self._known, self._wait = None, PATIENCE
        guard = GuardExpression()
        if self._arm is not None:
            self._arm(guard)
        self._ask()
        tensors = tuple([place.read() for place in self._places])
        if self._all.tensors() is None or not all(map(_plain, tensors)):
            return None
        if len(tensors) > MOST:
            same = self._compared(self._all.lie(list(tensors)))
        else:
            self._all.arm(guard, tensors)
            same = guard.compiled(f"({', '.join(f't{i}' for i in range(len(tensors)))},)")
        remembered: dict[Any, Any] = {}
        self._known, self._wait = (same, remembered), 0
        return remembered, tensors

    def _compared(self, lie: object) -> Callable[[], Any]:
        def same() -> tuple[Tensor, ...] | None:
            tensors = self._all.tensors()
            return None if tensors is None or self._all.lie(tensors) != lie else tuple(tensors)

        return same


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.data_ptr() != 0 and not tensor.is_neg()

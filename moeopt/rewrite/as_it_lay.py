"""Whether all weights of a bank lie as they lay: one generated comparison in the place of a look at each.

    lay = AsItLay(places, experts, check, arm)
    lay.look()          what was worked out of the weights as they lie, and the weights; anew once one of them moved

A small block of separate experts has a dozen weights or two and takes a hundred microseconds, and to look at each of
them by itself takes fifteen. The comparison asks the same of each (``AllPlaces``, ``Place``, ``Watch.expert``), and
holds no weight. What it does not know is read one by one as before, which alone says what is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from moeopt.rewrite.all_places import AllPlaces, OnePlace
from moeopt.rewrite.guard_expression import GuardExpression

MOST = 64
"""Weights of a bank beyond which a generated comparison would be long, and they are compared in a few calls."""
FEW = 24
"""Weights up to which all are looked at together sooner than two or three experts alone."""
PATIENCE = 32
"""Calls after which it is tried again to know a bank of which one weight could not be read."""

Arm = Callable[[GuardExpression], None]
"""Adds the terms that hold while no expert changes."""
Remembered = tuple[dict[Any, Any], tuple[Tensor, ...]]
"""What a kernel has worked out of the weights as they lie, for it to fill, and all weights."""


class ReadablePlace(OnePlace, Protocol):
    """A place that tells by an error what is not as it was verified."""

    def read(self) -> Tensor:
        """The tensor as it is now."""


class AsItLay:
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
        self._places, self._all, self._experts = places, AllPlaces(places), experts
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
        probe = GuardExpression()
        if self._arm is not None:
            self._arm(probe)
        self._ask()
        tensors = tuple([place.read() for place in self._places])
        if self._all.tensors() is None or not all(map(_plain, tensors)):
            return None
        if len(tensors) > MOST:
            same = self._compared(self._all.lie(list(tensors)))
        else:
            self._all.arm(probe, tensors)
            same = probe.compiled(f"({', '.join(f't{i}' for i in range(len(tensors)))},)")
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

"""The routing choices of a whole model's run: written down, and made again in another run of the same code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.value_types import FxTarget, PyObject
from moeopt.verification.selections import ROUTING, Event, make_event, regather


@functools.cache
def _chooses(func: OpOverload) -> bool:
    return isinstance(func, OpOverload) and func._schema.name in ROUTING


class RoutingLog(TorchDispatchMode):
    """Keeps each top-k, sort, argmax ... over floating scores that runs while it is open, as it chooses by itself.

    ``other``: by the number of a choice, from its own integers (..., K) to those that the run goes on with.
    """

    supports_higher_order_operators = True

    def __init__(self, other: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.events: list[Event] = []
        self._other = other or {}

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        out = func(*args, **(kwargs or {}))
        if not _chooses(func):
            return out
        event = make_event(func, args, kwargs or {}, out)
        if event is None or event.scores is None:
            return out
        self.events.append(event)
        change = self._other.get(len(self.events) - 1)
        if change is None:
            return out
        return _as_chosen(func, args, kwargs or {}, event.with_ids(change(event.ids)).outputs, out)


class RoutingPins(TorchDispatchMode):
    """While open, the routing choices of a run are those of ``events``, as far as they are met in the same order."""

    supports_higher_order_operators = True

    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._left = list(events)

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        out = func(*args, **(kwargs or {}))
        if not self._left or not _chooses(func):
            return out
        met = make_event(func, args, kwargs or {}, out)
        if met is None or met.scores is None:
            return out
        pinned = self._left[0]
        if pinned.op is not func or pinned.shapes != met.shapes:
            self._left = []  # another way through the code: nothing more can be pinned
            return out
        self._left.pop(0)
        return _as_chosen(func, args, kwargs or {}, pinned.outputs, out)


def _as_chosen(func: FxTarget, args: PyObject, kwargs: PyObject, pinned: tuple[Any, ...], out: PyObject) -> PyObject:
    """What an op gives that chooses as ``pinned`` says; ``out``, what it gave, where it has no such form."""
    again = regather(func, args, kwargs, pinned)
    if again is not None:
        return again
    return pinned[0].clone() if len(pinned) == 1 and pinned[0] is not None else out

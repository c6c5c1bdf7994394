"""The routing choices of a whole model's run: written down, and made again in another run of the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.compare.selections import ROUTING, Event, make_event, regather


class RoutingLog(TorchDispatchMode):
    """Keeps each top-k, sort, argmax ... over floating scores that runs while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ROUTING:
            event = make_event(func, args, kwargs or {}, out)
            if event is not None and event.scores is not None:
                self.events.append(event)
        return out


class RoutingPins(TorchDispatchMode):
    """While open, the routing choices of a run are those of ``events``, as far as they are met in the same order."""

    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()
        self._left = list(events)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in ROUTING or not self._left:
            return out
        met = make_event(func, args, kwargs or {}, out)
        if met is None or met.scores is None:
            return out
        pinned = self._left[0]
        if pinned.op is not func or pinned.shapes != met.shapes:
            self._left = []  # another way through the code: nothing more can be pinned
            return out
        self._left.pop(0)
        again = regather(func, args, kwargs or {}, pinned.outputs)
        if again is not None:
            return again
        return pinned.outputs[0].clone() if len(pinned.outputs) == 1 and pinned.outputs[0] is not None else out

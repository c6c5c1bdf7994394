"""The patches of Python's garbage collector."""

from __future__ import annotations

import gc

from moeopt.patches.patch import Patch, Undo, nothing

_OBJECTS = 20_000


def _raise_threshold() -> Undo:
    before = gc.get_threshold()
    if not 0 < before[0] < _OBJECTS:  # off, or rarer already
        return nothing
    raised = (_OBJECTS, *before[1:])
    gc.set_threshold(*raised)

    def undo() -> None:
        if gc.get_threshold() == raised:  # else the user has chosen another one meanwhile
            gc.set_threshold(*before)

    return undo


fewer_collections = Patch(_raise_threshold)
"""Collect garbage after 20 000 new objects instead of 700.

fx nodes point at one another, so dead tapes are left to Python's collector; at its default it runs thousands of
times and walks the whole model in most full passes: 15 % of the time of optimising 24 layers of 64 experts. A tape's
tensors are not part of those cycles and are freed at once either way.
"""


def _stop() -> Undo:
    if not gc.isenabled():
        return nothing
    gc.disable()
    return gc.enable


no_collections = Patch(_stop)
"""Collect no garbage, so that no finalizer runs between the calls of the code that is observed."""

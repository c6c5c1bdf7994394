"""The module around a block that holds its router too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.probe_inputs import call_specs
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined


def with_router(path: str, calls: Mapping[str, ArgsKwargs]) -> tuple[str, CallSpec] | None:
    """The path of the least module around a block that takes no expert ids, and what its arguments are.

    Experts are often a module of their own that is called with the router's choice. None where there is no such module.
    """
    while path in calls:
        reading = next(iter(_readings(calls[path])), None)
        if reading is None:
            return None
        if not reading.routed():
            return path, reading
        if not path:
            return None
        path = path.rpartition(".")[0]
    return None


def _readings(call: ArgsKwargs) -> Iterator[CallSpec]:
    with contextlib.suppress(Declined):
        yield from call_specs(*call)

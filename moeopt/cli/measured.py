"""Figures for the page that only a measurement gives: the time of a call before and after, and the memory it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from moeopt.errors import UsageError
from moeopt.inspection import Inspection, inspect
from moeopt.value_types import PyObject

REPEATS = 7


def figures(model: PyObject, optimized: PyObject) -> dict[str, Any]:
    """What ``Report.to_html`` takes besides: ``timings`` in seconds, and an ``inspection`` where there can be one.

    An engine that cannot run here is not timed.
    """
    found: dict[str, Any] = {}
    if optimized.certificate.executed:
        found["timings"] = timings(model, optimized)
    inspection = _inspection(model)
    return found if inspection is None else {**found, "inspection": inspection}


def timings(model: PyObject, optimized: PyObject) -> dict[str, float]:
    """Seconds of one call on the inputs that the model was optimised with: the quickest of some, in turns."""
    args, kwargs = optimized._call
    original = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    calls: dict[str, Callable[..., Any]] = {"original": original, f"moeopt on {optimized.report.backend}": optimized}
    best = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for _ in range(REPEATS + 1):  # the first of each warms up and is hardly ever the quickest
            for name, call in calls.items():
                started = time.perf_counter()
                call(*args, **kwargs)
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def _inspection(model: PyObject) -> Inspection | None:
    try:
        return inspect(model)
    except UsageError:  # an ExportedProgram: the page has no section of memory then
        return None

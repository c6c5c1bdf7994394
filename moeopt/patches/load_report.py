"""The patch of transformers' report of tensors that do not become its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from moeopt.patches.patch import InForce, Mine, Patch, Undo, nothing, replace
from moeopt.value_types import PyObject

_broken = Mine()


def _keep_reports() -> Undo:
    from transformers.utils import loading_report

    kind = getattr(loading_report, "LoadStateDictInfo", None)  # before 5.15, and in 4.57, it is printed
    return nothing if kind is None else replace(kind, "create_loading_report", _kept)


def _kept(theirs: PyObject, in_force: InForce) -> PyObject:
    def create_loading_report(info: PyObject, *args: PyObject, **options: PyObject) -> PyObject:
        broken = _broken.top
        if broken is None or not in_force.yes:
            return theirs(info, *args, **options)
        broken.update(info.conversion_errors)
        if broken:
            raise RuntimeError("; ".join(f"{name}: {' '.join(str(why).split())}" for name, why in broken.items()))
        return None  # nothing is logged, at whatever level the user set

    return create_loading_report


_reports = Patch(_keep_reports)


@contextlib.contextmanager
def kept_load_report() -> Iterator[dict[str, Any]]:
    """While open, ``from_pretrained`` in this thread logs no report; yields what it says of Parameters, by path, that
    could not be put together of the checkpoint's tensors: ``from_pretrained`` ends in a ``RuntimeError`` then."""
    broken: dict[str, Any] = {}
    with _reports(), _broken.holding(broken):
        yield broken

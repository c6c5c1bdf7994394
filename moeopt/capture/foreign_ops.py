"""Ops of other libraries, whose kernels may do more than raise an error where they get no rows.

The kernel of bitsandbytes 0.50 for 4 bits divides by the number of rows and ends the process. What a model does not do
itself, is not done with such an op.
"""

from __future__ import annotations

from moeopt.value_types import FxTarget

_TAKE_NO_ROWS = ("aten", "prims", "prim", "moeopt")


def of_another_library(func: FxTarget) -> bool:
    """Whether ``func`` is an op that neither PyTorch nor moeopt has written."""
    return getattr(func, "namespace", "aten") not in _TAKE_NO_ROWS

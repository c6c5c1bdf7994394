"""Forward-mode differentiation, of which PyTorch gives custom ops no tangents, and says nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch.autograd import forward_ad

from moeopt.value_types import PyObject

OpImpl = Callable[..., PyObject]


def refusing_tangents(op: str, kernel: OpImpl) -> OpImpl:
    """``kernel`` of the custom op ``op``, for a dispatch key below that of autograd, where duals are taken apart.

    The result would have tangents of zero. Which argument had one is not known there, so it raises ``RuntimeError``
    wherever forward-mode differentiation is at work.
    """

    @functools.wraps(kernel)
    def run(*args: PyObject, **kwargs: PyObject) -> PyObject:
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                f"moeopt::{op} has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, "
                "torch.autograd.forward_ad); take it of the original model, or differentiate backwards"
            )
        return kernel(*args, **kwargs)

    return run

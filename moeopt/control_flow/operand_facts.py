"""What is recorded of an operand's value: numbers, text and tuples of these; and whose code a function is."""

from __future__ import annotations

import types
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.capture.held_contents import foreign
from moeopt.value_types import PyObject

UNKNOWN = "?"
"""First item of the record of an operand that cannot be looked up; the values of its known parts follow."""
MOST = 64
"""Items up to which a tuple is recorded."""


def is_unknown(value: PyObject) -> bool:
    """Whether ``value`` is that of an operand that could not be looked up."""
    return isinstance(value, tuple) and value[:1] == (UNKNOWN,)


def is_torch(function: PyObject) -> bool:
    """Whether ``function`` is PyTorch's, so that what it does is on the tape."""
    name = getattr(function, "__name__", "")
    return str(getattr(function, "__module__", None) or "").startswith("torch") or any(
        getattr(module, name, None) is function for module in (torch, nn.functional)
    )


def is_users(function: PyObject) -> bool:
    """Whether a function or a class is the user's, so that its own code is watched when it runs."""
    kinds = (type, types.FunctionType, types.MethodType)
    return isinstance(function, kinds) and not foreign(function.__module__ or "")


def plain(value: PyObject) -> PyObject:
    """A number, text or tuple of these as it is; ``Tensor`` for a tensor, None for all else."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, np.number):
        return value.item()
    if isinstance(value, range):
        return value
    if isinstance(value, Mapping) and (items := plain(tuple(value.items()))) is not None:
        return items
    if isinstance(value, (list, tuple, set, frozenset, Mapping)) and len(value) <= MOST:
        parts = [plain(part) for part in value]
        if any(part is None or part is Tensor for part in parts):
            return None
        return tuple(sorted(parts, key=repr)) if isinstance(value, (set, frozenset)) else tuple(parts)
    return None

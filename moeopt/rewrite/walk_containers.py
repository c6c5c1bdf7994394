"""How a walk reads tensors, arrays and Python's own containers: what is compared at each call, and what by length only.

Each function writes the value down on a :class:`moeopt.rewrite.walk.Walk`, adds the terms that notice a change to its
guard, and visits the parts.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from moeopt.rewrite.value_text import array_text, key_text, plain, readable, tensor_text
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from moeopt.rewrite.walk import Walk

SMALL = 64
"""Elements up to which a tensor on the CPU is compared by value at each call."""
_WHOLE = 64
"""Entries up to which a dict is watched as a whole; of a larger one the keys that the code names are."""
_LONG = 1024
"""Elements up to which a list or set is compared; a longer one is watched by its length."""
_BYTES = 4096
"""Size up to which a NumPy array is compared by value at each call."""


def read_tensor(walk: Walk, place: str, value: torch.Tensor) -> None:
    walk.note(place, "tensor", tensor_text(value))
    if not readable(value):
        walk.opaque[place] = value
    if type(value) in (torch.Tensor, nn.Parameter, nn.Buffer) and not value.is_meta:
        with _disable_current_modes(), torch.no_grad():
            walk.guard.tensor(value, value.numel() <= SMALL and value.device.type == "cpu")


def read_array(walk: Walk, place: str, value: PyObject) -> None:
    numpy = hasattr(value, "tobytes") and hasattr(value, "nbytes")  # else of ``array`` or ``ctypes``
    count = value.nbytes if numpy else memoryview(value).nbytes
    small = count <= _BYTES and not (numpy and value.dtype.hasobject)
    if numpy:
        walk.note(place, "array", array_text(value))
    else:
        walk.note(place, type(value).__qualname__, bytes(value).hex() if small else str(count))
    if small and numpy:
        walk.guard.add("{0}.tobytes() == {1}", value, value.tobytes())
    elif small:
        walk.guard.add("{0}({1}) == {2}", bytes, value, bytes(value))
    else:
        walk.opaque[place] = value


def read_dict(walk: Walk, place: str, value: PyObject) -> None:
    whole = len(value) <= _WHOLE
    named = [k for k in value if k in walk.names or not isinstance(k, str)][:_LONG]
    registry = bool(named) and all(callable(v) for v in value.values())
    keys = list(value) if whole and not registry else named
    walk.note(place, "dict", "" if registry or not whole else ", ".join(map(key_text, keys)))
    if type(value) is not types.MappingProxyType:
        walk.guard.keys(value)
    for key in keys:
        walk.link(walk.guard, value, key, dict.__getitem__(value, key) if isinstance(value, dict) else value[key],
                   f"{place}[{key_text(key)}]")  # fmt: skip
    if type(value) is not dict:
        walk.instance(place, value, note=False)


def read_sequence(walk: Walk, place: str, value: PyObject) -> None:
    walk.note(place, type(value).__name__, str(len(value)))
    changes = not isinstance(value, tuple)
    if len(value) > _LONG:
        walk.guard.add(f"{{0}}({{1}}) == {len(value)}", len, value)
    elif all(plain(v) is not None for v in value):
        for index, part in enumerate(value):
            walk.visit(f"{place}[{index}]", part)
        if changes:
            walk.guard.equal(value, value.copy())
    else:
        walk.guard.add(f"{{0}}({{1}}) == {len(value)}", len, value)
        for index, part in enumerate(value):
            if changes:
                walk.guard.add(f"{{0}}[{index}] is {{1}}", value, part)
            walk.visit(f"{place}[{index}]", part)
    if type(value) not in (list, tuple):
        walk.instance(place, value, note=False)


def read_set(walk: Walk, place: str, value: PyObject) -> None:
    short = len(value) <= _LONG or isinstance(value, bytearray)
    spelled = str(sorted(map(key_text, value))) if short else str(len(value))
    walk.note(place, type(value).__name__, spelled)
    if short and not isinstance(value, frozenset):
        walk.guard.equal(value, value.copy())

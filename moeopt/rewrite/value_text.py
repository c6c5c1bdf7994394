"""Values as text: equal text for equal values, in this process, in a copy and after a pickle."""

from __future__ import annotations

import enum
import hashlib
import threading
import types

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from moeopt.capture.held_contents import foreign
from moeopt.rewrite.bytecode import fingerprint
from moeopt.value_types import PyObject

Spelled = tuple[str, str]

HASHED = 1 << 22
"""Bytes up to which a tensor or an array is written down by value."""
_LEAVES = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_BY_TEXT = ("decimal", "fractions", "datetime", "re", "pathlib", "uuid", "numpy")
_INERT = ("logging", "functools", "threading", "_thread", "contextlib", "abc")
"""Modules whose objects hold nothing that decides a number."""


_ARRAYS = {
    ("numpy", "ndarray"), ("array", "array"), ("_ctypes", "_SimpleCData"), ("_ctypes", "Array"),
    ("_ctypes", "Structure"), ("_ctypes", "Union"),
}  # fmt: skip


def plain(value: PyObject) -> Spelled | None:
    """A value that has no parts, as (type, text); None for anything else."""
    cls = type(value)
    if isinstance(value, enum.Enum):
        return cls.__qualname__, f"{cls.__qualname__}.{value.name}"
    if cls in _LEAVES or isinstance(value, _TORCH):
        return cls.__name__, repr(value)
    if cls.__module__.partition(".")[0] in _BY_TEXT and not hasattr(value, "__dict__") and not is_array(value):
        return cls.__name__, repr(value)
    return None


def is_array(value: PyObject) -> bool:
    """Whether it is numbers in memory: of NumPy, ``array`` or ``ctypes``."""
    return any((cls.__module__, cls.__name__) in _ARRAYS for cls in type(value).__mro__)


def tensor_text(value: torch.Tensor) -> str:
    """Dtype, shape, and where it is small enough and plain a digest of its values."""
    about = f"{value.dtype} {tuple(value.shape)}"
    if readable(value):
        with _disable_current_modes(), torch.no_grad():
            flat = value.detach().cpu().contiguous().reshape(-1)
            about += _hash(flat.view(torch.uint8).numpy().tobytes())
    return about


def readable(value: torch.Tensor) -> bool:
    """Whether a tensor is written down by value: no subclass, not on the meta device, not too large."""
    real = type(value) in (torch.Tensor, nn.Parameter, nn.Buffer) and not value.is_meta
    return real and value.layout is torch.strided and value.numel() * value.element_size() <= HASHED


def array_text(value: PyObject) -> str:
    """As ``tensor_text``, of a NumPy array."""
    about = f"{value.dtype} {value.shape}"
    return about + _hash(value.tobytes()) if value.nbytes <= HASHED and not value.dtype.hasobject else about


def inert(value: PyObject) -> bool:
    """A library's own modules and tools, which an installed package does not exchange."""
    module = isinstance(value, types.ModuleType) and foreign(value.__name__)
    return module or tells_nothing(type(value))


def tells_nothing(cls: type) -> bool:
    """Whether an object of ``cls`` holds nothing that decides a number: loggers, locks, context managers."""
    return cls.__module__ in _INERT and not issubclass(cls, threading.local)


def key_text(key: PyObject) -> str:
    leaf = plain(key)
    if leaf is not None:
        return leaf[1]
    if isinstance(key, tuple):
        return f"({', '.join(map(key_text, key))})"
    return fingerprint(key) if callable(key) else type(key).__qualname__


def _hash(data: bytes) -> str:
    return f" {hashlib.sha256(data).hexdigest()[:16]}"

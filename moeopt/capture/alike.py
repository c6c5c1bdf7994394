"""Are two modules the same code over other weights? Compared part by part, exactly; nothing is believed by name.

Alike modules have the same classes at the same paths, and attributes, buffers, training flags and shared tensors that
are equal in every bit. Parameters alone may have other values, of the same dtype, shape, strides and sharing. One
all of whose elements are one number (zeros of a fresh bias, ones of a fresh scale) must be equal too: what such a value
does cannot be seen, so what was read from one module need not hold for another. Hooks, patched forwards and
objects that cannot be compared are unlike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moeopt.ir.element_bytes import element_bytes
from moeopt.value_types import PyObject

_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
_KIND: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.dtype, lambda t: t.device, lambda t: t.shape, lambda t: t.stride(), lambda t: t.storage_offset(),
    lambda t: t.requires_grad, lambda t: t.is_leaf, lambda t: t.is_inference(), lambda t: t.is_conj(),
    lambda t: t.is_neg(), lambda t: t.grad is None,
)  # fmt: skip


def unlike(
    a: nn.Module,
    b: nn.Module,
    ignored: Callable[[str, nn.Module, str], bool] = lambda path, module, name: False,
    *,
    buffers: bool = True,
) -> str:
    """What ``b`` has otherwise than ``a``, in words; "" where they are alike.

    Args:
        ignored: whether an attribute is left out: of the module at a path in ``a`` or ``b``, the attribute's name.
        buffers: whether buffers must have equal values; else they may differ in what parameters may.
    """
    first, second = dict(a.named_modules(remove_duplicate=False)), dict(b.named_modules(remove_duplicate=False))
    if list(first) != list(second):
        return "it has other submodules"
    pairs = _Pairs()
    for path in first:
        one, other = first[path], second[path]
        named = f"{path or 'the block'}"
        if type(one) is not type(other):
            return f"{named} is a {type(other).__name__}, not a {type(one).__name__}"
        if not pairs.match(one, other):
            return f"{named} is shared otherwise"
        if why := _unlike_attributes(one, other, path, ignored, pairs, buffers):
            return f"{why} of {named} differs"
    return ""


def _unlike_attributes(
    a: nn.Module, b: nn.Module, path: str, ignored: Callable[[str, nn.Module, str], bool], pairs: _Pairs, buffers: bool
) -> str:
    """The name of an attribute in which two modules differ, or ""."""

    def held(module: nn.Module) -> dict[str, Any]:
        return {n: v for n, v in module.__dict__.items() if n not in _TABLES and not ignored(path, module, n)}

    mine, other = held(a), held(b)
    if mine.keys() != other.keys():
        return next(iter(mine.keys() ^ other.keys()))
    if "forward" in mine:
        return "forward"
    for name, value in mine.items():
        if "_hooks" in name and (value or other[name]):
            return name
        if not _equal(value, other[name], pairs):
            return name
    for table in ("_parameters", "_buffers"):
        ours, theirs = a.__dict__[table], b.__dict__[table]
        if list(ours) != list(theirs):
            return table
        for name, tensor in ours.items():
            if not _same_tensor(tensor, theirs[name], pairs, values=buffers and table == "_buffers"):
                return str(name)
    return ""


def unequal_plain(a: nn.Module, b: nn.Module) -> frozenset[tuple[str, str]]:
    """Which plain attributes (numbers, words, None) have other values in ``b``, as (path of the module, name)."""
    others = dict(b.named_modules(remove_duplicate=False))
    return frozenset(
        (path, name)
        for path, module in a.named_modules(remove_duplicate=False)
        if path in others
        for name, value in module.__dict__.items()
        if name != "training" and name in others[path].__dict__ and type(value) in _PLAIN
        if type(other := others[path].__dict__[name]) in _PLAIN and not _equal_plain(value, other)
    )


def equal_values(a: PyObject, b: PyObject) -> bool:
    """Whether two plain values, tensors, or containers of such are equal, tensors in every bit."""
    return _equal(a, b, _Pairs())


def _equal_plain(a: PyObject, b: PyObject) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)  # -0.0 is not 0.0 here, and nan is nan


class _Pairs:
    """Which object of one module stands where which of the other does."""

    def __init__(self) -> None:
        self._there: dict[Any, Any] = {}
        self._back: dict[Any, Any] = {}
        self._alive: list[Any] = []

    def match(self, a: PyObject, b: PyObject) -> bool:
        """Whether ``a`` and ``b`` stand for each other wherever either stands."""
        self._alive += [a, b]  # an id is an object's own only while it lives
        return self.match_keys(id(a), id(b))

    def match_keys(self, a: PyObject, b: PyObject) -> bool:
        """The same for two keys: of objects, or of the memory of tensors."""
        return bool(self._there.setdefault(a, b) == b and self._back.setdefault(b, a) == a)


def _equal(a: PyObject, b: PyObject, pairs: _Pairs) -> bool:
    """Equal plain values, tensors and containers of them; anything else only where both are one object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return _same_tensor(a, b, pairs, values=True)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(_equal(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and type(a).__module__ in ("builtins", "collections"):
        return len(a) == len(b) and all(
            _equal(k, m, pairs) and _equal(v, w, pairs) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if type(a) in (set, frozenset):
        return all(type(x) in _PLAIN for x in (*a, *b)) and sorted(map(repr, a)) == sorted(map(repr, b))
    return type(a) in _PLAIN and _equal_plain(a, b)


def _same_tensor(a: PyObject, b: PyObject, pairs: _Pairs, *, values: bool) -> bool:
    """The same kind of tensor, sharing memory with the same others; with ``values``, with the same bits too."""
    if a is None or b is None:
        return a is b
    if type(a) is not type(b) or type(a) not in _TENSORS or a.layout != torch.strided or a.is_meta:
        return a is b
    if not all(f(a) == f(b) for f in _KIND) or a._backward_hooks or b._backward_hooks:
        return False
    if not pairs.match(a, b) or not _equal(vars(a), vars(b), pairs):
        return False
    stores = a.untyped_storage(), b.untyped_storage()
    if stores[0].nbytes() != stores[1].nbytes() or not pairs.match_keys(*(("memory", s._cdata) for s in stores)):
        return False
    return _same_bits(a, b) if values or _one_number(a) or _one_number(b) else True


def _one_number(t: torch.Tensor) -> bool:
    """Whether all elements are one number; the first and the last, of most tensors two numbers, are compared first."""
    with torch.no_grad():
        flat = t.detach().reshape(-1)
        return bool(t.numel()) and bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(element_bytes(a), element_bytes(b))

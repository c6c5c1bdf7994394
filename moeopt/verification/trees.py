"""Outputs as trees: tuples, dicts, dataclasses, caches - whatever holds the tensors.

``pytree`` opens the containers it knows; a dataclass or a plain object is opened by its attributes, so
that a loss in a dataclass or a key in a cache is compared like any other output. Two named tuples have one
structure where their class names and fields are equal, and so have two results of registered data classes: an engine
may know no more of the class than these.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import ItemsView, Iterable, KeysView, Mapping, ValuesView
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.value_types import PyObject
from moeopt.verification.fields import by_name, is_result_class

_SCALAR: tuple[type, ...] = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    range,
    Decimal,
    Fraction,
    torch.dtype,
    torch.device,
    torch.Size,
    nn.Module,
    type,
)


def flatten(tree: PyObject) -> tuple[list[Any], Any]:
    """(leaves, form): tensors and plain values in order, and a structure that compares equal or not."""
    return pytree.tree_flatten(_opened(tree, frozenset()))


def _opened(tree: PyObject, above: frozenset[int]) -> PyObject:
    return pytree.tree_map(lambda leaf: _open_leaf(leaf, above), tree, is_leaf=_is_named)


def _is_named(value: PyObject) -> bool:
    return (isinstance(value, tuple) and pytree.is_namedtuple_class(type(value))) or is_result_class(value)


def _named(value: PyObject) -> tuple[str, dict[str, Any]] | None:
    """The class and the fields of what :func:`_is_named`."""
    if pytree.is_namedtuple_class(type(value)):
        return type(value).__name__, dict(zip(value._fields, value, strict=True))
    return by_name(value)


def _open_leaf(leaf: PyObject, above: frozenset[int]) -> PyObject:
    if isinstance(leaf, (Tensor, *_SCALAR)) or callable(leaf) or id(leaf) in above:
        return leaf
    if _is_named(leaf) and (named := _named(leaf)) is not None:
        return {f"{named[0]} by name": {name: _opened(part, above) for name, part in named[1].items()}}
    inside = _inside(leaf)
    return leaf if inside is None else (type(leaf).__qualname__, _opened(inside, above | {id(leaf)}))


def _inside(leaf: PyObject) -> PyObject:
    """What an object holds: its fields, or its attributes and what a container of its class holds; None where it cannot
    be opened, as a set, whose order says nothing."""
    if dataclasses.is_dataclass(leaf):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    slots = [name for one in type(leaf).__mro__ for name in _names(one.__dict__.get("__slots__", ()))]
    named = {name: getattr(leaf, name) for name in slots if hasattr(leaf, name)} | dict(getattr(leaf, "__dict__", {}))
    if isinstance(leaf, Mapping):
        return [dict(leaf), named] if named else dict(leaf)
    if isinstance(leaf, (list, tuple, deque, ValuesView, ItemsView, KeysView)):
        return [list(leaf), named] if named else list(leaf)
    if isinstance(leaf, np.ndarray):
        return [leaf.shape, leaf.ravel().tolist()] if leaf.dtype == object else None
    if isinstance(leaf, slice):
        return [leaf.start, leaf.stop, leaf.step]
    return named if slots or hasattr(leaf, "__dict__") else None


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def not_comparable(leaf: PyObject) -> bool:
    """Whether only the types of such leaves are compared, whatever they hold: functions, modules, iterators, sets."""
    if isinstance(leaf, nn.Module):
        return True
    return not isinstance(leaf, (Tensor, np.ndarray, np.generic, *_SCALAR))


def describe(value: PyObject) -> str:
    """A tensor's dtype and shape, a container's contents, any other value's type: for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {describe(item)}" for name, item in value.items()) + "}"
    return type(value).__name__


def same_calls(one: PyObject, other: PyObject) -> bool:
    """Whether two calls give a model the same: equal tensors and scalars, and objects that are the same ones."""
    (mine, spec), (theirs, spec_other) = flatten(one), flatten(other)
    return spec == spec_other and all(map(_same, mine, theirs))


def _same(a: PyObject, b: PyObject) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or ((a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(a, b))
    return a is b or (isinstance(a, _SCALAR) and equal_leaves(a, b))


def numbers(leaf: PyObject) -> PyObject:
    """A Python float or complex number, an array of NumPy, a sparse or a nested tensor as a dense tensor; anything else
    as it is."""
    if isinstance(leaf, Tensor) and leaf.is_nested:
        return torch.nested.to_padded_tensor(leaf, 0.0)
    if isinstance(leaf, Tensor) and leaf.layout not in (torch.strided, torch._mkldnn):  # type: ignore[attr-defined]
        return leaf.to_dense()
    if isinstance(leaf, (float, complex)):
        return torch.tensor(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)):
        try:
            return torch.from_numpy(np.array(leaf))  # a copy: views may run backwards, and be read only
        except TypeError:  # of text, of objects, of a dtype that PyTorch has not
            return leaf
    return leaf


def equal_leaves(a: PyObject, b: PyObject) -> bool:
    """Whether two leaves that are not tensors are the same value; objects without one: the same type."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):  # of text: the others are tensors or lists by then
        return np.array_equal(a, b)
    if not isinstance(a, _SCALAR) or isinstance(a, nn.Module):
        return type(a) is type(b)
    return type(a) is type(b) and (a == b or (a != a and b != b))

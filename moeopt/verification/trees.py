"""Outputs as trees: tuples, dicts, dataclasses, caches - whatever holds the tensors.

``pytree`` opens the containers it knows; a dataclass or a plain object is opened by its attributes, so
that a loss in a dataclass or a key in a cache is compared like any other output. Two named tuples have one
structure where their class names and fields are equal, and so have two results of registered data classes: an engine
may know no more of the class than these.
"""

from __future__ import annotations

import dataclasses
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
    if dataclasses.is_dataclass(leaf):
        inside: PyObject = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    elif hasattr(leaf, "__dict__"):
        inside = vars(leaf)
    else:
        return leaf
    return type(leaf).__qualname__, _opened(dict(inside), above | {id(leaf)})


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
    """A Python float or complex number, or an array of NumPy, as a tensor; anything else as it is."""
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
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):  # of text or of objects: the others are tensors by then
        return np.array_equal(a, b)
    if not isinstance(a, _SCALAR) or isinstance(a, nn.Module):
        return type(a) is type(b)
    return type(a) is type(b) and (a == b or (a != a and b != b))

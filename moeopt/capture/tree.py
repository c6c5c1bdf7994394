"""Containers that models pass and return: tuples, dicts, dataclasses, ModelOutputs, nested at will.

``torch.utils._pytree`` stops at a dataclass that nobody registered, and hides the tensors in it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from moeopt.value_types import PyObject

ArgsKwargs = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one call, ``(args, kwargs)``."""


def tree_map(kind: type | tuple[type, ...], fn: Callable[[Any], Any], tree: PyObject) -> PyObject:
    """``tree`` with ``fn`` applied to each leaf that is a ``kind``; other leaves stay as they are."""
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return tuple.__new__(type(tree), (tree_map(kind, fn, t) for t in tree))  # its own __new__ may ask for tensors
    if type(tree) in (tuple, list):
        return type(tree)(tree_map(kind, fn, t) for t in tree)
    if isinstance(tree, tuple) and type(tree).__module__ == "torch.return_types":
        return tuple(tree_map(kind, fn, t) for t in tree)
    if isinstance(tree, list):
        return [tree_map(kind, fn, t) for t in tree]
    if type(tree) is dict:
        return {k: tree_map(kind, fn, v) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(tree_map(kind, fn, t) for t in (tree.start, tree.stop, tree.step)))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _map_dataclass(kind, fn, tree)
    if isinstance(tree, MutableMapping):
        new = copy.copy(tree)
        for key, value in tree.items():
            new[key] = tree_map(kind, fn, value)
        return new
    return tree


def _map_dataclass(kind: type | tuple[type, ...], fn: Callable[[Any], Any], tree: PyObject) -> PyObject:
    new = copy.copy(tree)
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name, None)
        mapped = tree_map(kind, fn, value)
        if mapped is value:
            continue
        if isinstance(tree, MutableMapping):  # a ModelOutput: attribute and key are one
            setattr(new, field.name, mapped)
        else:
            object.__setattr__(new, field.name, mapped)
    return new


def tree_leaves(tree: PyObject) -> Iterator[Any]:
    """Every leaf, in a fixed order; None counts as a leaf."""
    if isinstance(tree, (list, tuple)):
        for t in tree:
            yield from tree_leaves(t)
    elif isinstance(tree, slice):
        yield from (tree.start, tree.stop, tree.step)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tree_leaves(getattr(tree, field.name, None))
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tree_leaves(value)
    else:
        yield tree


def leaves_of(kind: type, tree: PyObject) -> list[Any]:
    """The leaves that are a ``kind``."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, kind)]

"""A snapshot of the Python state of modules: attributes, contents of containers, objects of the user's classes.

A forward may write to any of these (``self.stats["load"].append(...)``, ``self.state.step += 1``, a hook that removes
itself). The snapshot follows references from attribute to item to attribute, breadth first, and does not look into
objects of Python's and PyTorch's classes. Restoring it also undoes what other threads wrote there meanwhile.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.held_contents import (
    CONTAINERS,
    copied,
    is_container,
    is_open,
    parts,
    put_back,
    refill,
    slots_of,
    table_of,
)
from moeopt.value_types import PyObject

TABLES = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type, enum.Enum)
_DEPTH = 6
"""References that are followed from a module, at most."""
_LONG = 1024
"""The items of a longer container are not followed; its contents are kept."""
_BYTES = 1 << 20
"""The largest NumPy array that is copied."""
_ALL_BYTES = 1 << 26
"""All copied arrays together."""
_ALL_ITEMS = 1 << 20
"""Items of all copied containers together; containers that are attributes of a module do not count."""


class HeldState:
    """A snapshot of the Python state of ``modules``.

    Args:
        modules: each with its path.

    Attributes:
        attributes: each module with a copy of its ``__dict__``, and its path.
        contents: by id, containers and copies of them; plain containers only where they were not empty.
        tensors: by place, tensors that are no Parameter or buffer; their values are not copied.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.attributes = [(m, dict(m.__dict__), path) for path, m in modules]
        self.contents: dict[int, tuple[Any, Any]] = {}
        self._bare: list[Any] = []  # empty containers, mostly tables of hooks: a model has thousands, so no copies
        self._slots: list[tuple[Any, Any, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        self._items_left, self._bytes_left = _ALL_ITEMS, _ALL_BYTES
        self._ahead: deque[tuple[Any, str, int]] = deque()
        for _, attributes, path in self.attributes:
            for name, value in attributes.items():
                if name not in TABLES:
                    self._ahead.append((value, f"{path}.{name}" if path else name, _DEPTH))
                elif type(value) in CONTAINERS:  # nn.Module's own tables, which no other object shares
                    if value:
                        self.contents[id(value)] = value, value.copy()
                    else:
                        self._bare.append(value)
        while self._ahead:  # breadth first: an object is reached by its shortest path, with most steps left
            self._keep(*self._ahead.popleft())

    def held(self, container: PyObject) -> PyObject:
        """The contents that a plain container, an attribute of a module, had in the snapshot."""
        return self.contents[id(container)][1] if id(container) in self.contents else type(container)()

    def _contained(self, value: PyObject, depth: int) -> bool:
        """Copy the contents of the container ``value``; returns whether its items are to be followed."""
        if type(value) in CONTAINERS and not value:  # of another class, `not value` would call the user's method
            self._bare.append(value)
            return False
        held = copied(value)
        if depth < _DEPTH:
            self._items_left -= len(held)
            if self._items_left < 0:
                return False
        self.contents[id(value)] = value, held
        return len(held) <= _LONG

    def _keep(self, value: PyObject, place: str, depth: int) -> None:
        if isinstance(value, (*_PLAIN, nn.Module)) or not depth:
            return
        if self._items_left < 0 and depth < _DEPTH:
            return
        if isinstance(value, Tensor):
            self.tensors.setdefault(place, value)
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        items: list[Any] = list(value) if type(value) is tuple else []
        if is_container(value) and self._contained(value, depth):
            items = parts(value)
        if isinstance(value, tuple) and not items:
            items = list(tuple.__iter__(value))
        for number, part in enumerate(items if len(items) <= _LONG else ()):
            if not isinstance(part, _PLAIN):
                self._ahead.append((part, f"{place}[{number}]", depth - 1))
        if type(value).__module__ == "numpy" and hasattr(value, "nbytes") and hasattr(value, "flags"):
            if value.nbytes <= min(_BYTES, self._bytes_left) and value.flags.writeable:
                self._bytes_left -= value.nbytes
                self._arrays.append((value, value.copy()))
        elif is_open(value):
            self._keep_attributes(value, place, depth)

    def _keep_attributes(self, value: PyObject, place: str, depth: int) -> None:
        named: list[tuple[str, Any]] = []
        if (table := table_of(value)) is not None:
            self.contents[id(table)] = table, dict(table)
            named += table.items()
        for slot, held in slots_of(value):
            self._slots.append((value, slot, held))
            named.append((slot.__name__, held))
        self._ahead.extend((part, f"{place}.{name}", depth - 1) for name, part in named)

    def restore(self) -> None:
        """Restore the snapshot: the same objects as before, and no copies of them."""
        for container in filter(None, self._bare):
            container.clear()
        for container, held in self.contents.values():
            put_back(container, held)
        for value, slot, held in self._slots:
            refill(value, slot, held)
        for array, values in self._arrays:
            array[...] = values
        for module, attributes, _ in self.attributes:
            put_back(module.__dict__, attributes)

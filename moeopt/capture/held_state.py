"""What modules hold beside their tensors, as it was: attributes, contents of containers, objects of the user's own.

A forward may write into any of these (``self.stats["load"].append(...)``, ``self.state.step += 1``, a hook that takes
itself away). They are followed from attribute to item to attribute; an object of Python's or PyTorch's own classes is
not looked into.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.value_types import PyObject

CONTAINERS = (list, dict, set, OrderedDict, defaultdict, Counter, deque, bytearray)
"""Of these exact types; the tables of ``nn.Module`` (parameters, submodules, hooks) are among them."""
TABLES = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type, enum.Enum)
_DEPTH = 6
"""So many steps from a module."""
_LONG = 1024
"""Items up to which those of a container are followed; a longer one is kept as it is."""
_BYTES = 1 << 20
"""Size up to which a NumPy array is kept."""


class HeldState:
    """A snapshot of what ``modules`` hold.

    Args:
        modules: each with its path.

    Attributes:
        tensors: those that are no Parameter or buffer, by the place that leads to them; their values are not kept.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._attributes = [(m, dict(m.__dict__), path) for path, m in modules]
        self._bare: list[Any] = []  # most are a module's tables of hooks: no copy for these, a model has thousands
        self._contents: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for _, attributes, path in self._attributes:
            for name, value in attributes.items():
                if name in TABLES:  # these are nobody else's
                    if value and type(value) in CONTAINERS:
                        self._contents.append((value, value.copy()))
                    elif type(value) in CONTAINERS:
                        self._bare.append(value)
                else:
                    self._keep(value, f"{path}.{name}" if path else name, _DEPTH)

    def _contained(self, value: PyObject) -> bool:
        """Keep the contents of ``value`` where it is a container; whether there are any."""
        if type(value) in CONTAINERS and id(value) not in self._seen:
            self._seen.add(id(value))
            if value:
                self._contents.append((value, value.copy()))
                return True
            self._bare.append(value)
        return False

    def _keep(self, value: PyObject, place: str, depth: int) -> None:
        if isinstance(value, (*_PLAIN, nn.Module)) or not depth:
            return
        if isinstance(value, Tensor):
            self.tensors.setdefault(place, value)
        elif isinstance(value, dict) and type(value) in CONTAINERS:
            if self._contained(value) and len(value) <= _LONG:
                for number, part in enumerate(value.values()):
                    self._keep(part, f"{place}[{number}]", depth - 1)
        elif isinstance(value, tuple) or type(value) in CONTAINERS:
            if (isinstance(value, tuple) or self._contained(value)) and len(value) <= _LONG:
                for number, part in enumerate(value):
                    self._keep(part, f"{place}[{number}]", depth - 1)
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            if type(value).__module__ == "numpy" and hasattr(value, "nbytes") and hasattr(value, "flags"):
                if value.nbytes <= _BYTES and value.flags.writeable:
                    self._arrays.append((value, value.copy()))
            elif (table := _attributes_of(value)) is not None:
                self._contents.append((table, dict(table)))
                for name, part in table.items():
                    self._keep(part, f"{place}.{name}", depth - 1)

    def restore(self) -> None:
        """Put everything back, the objects themselves and not copies."""
        for container in filter(None, self._bare):
            container.clear()
        for container, held in self._contents:
            put_back(container, held)
        for array, values in self._arrays:
            array[...] = values
        for module, attributes, _ in self._attributes:
            put_back(module.__dict__, attributes)


def put_back(container: PyObject, held: PyObject) -> None:
    """Give ``container`` the items that ``held`` has, where it has others."""
    if isinstance(container, dict) and len(container) == len(held) and all(map(is_, container, held)):
        for name, value in held.items():  # never without its names: other threads may read it
            if container[name] is not value:
                container[name] = value
    elif not same_items(container, held):
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(held)


def same_items(now: PyObject, before: PyObject) -> bool:
    """The same names or items, in the same order, for the same objects."""
    if len(now) != len(before) or not all(map(is_, now, before)):
        return False
    return not isinstance(now, dict) or all(map(is_, now.values(), before.values()))


def _attributes_of(value: PyObject) -> dict[str, Any] | None:
    """The attributes of an object of the user's, or of a library that is neither Python nor PyTorch."""
    cls = type(value)
    top = cls.__module__.partition(".")[0]
    own = top == "__main__" or top not in sys.stdlib_module_names and top not in ("torch", "numpy", "moeopt")
    if not own and not issubclass(cls, types.SimpleNamespace):
        return None
    try:
        table = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return table if isinstance(table, dict) else None

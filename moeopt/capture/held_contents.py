"""The contents of one container or object, copied and restored: lists, dicts, sets, their subclasses, and slots.

A user's subclass may override ``clear`` or ``update``, so the methods of the base class are called.
"""

from __future__ import annotations

import sys
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterator
from operator import is_
from typing import Any

from moeopt.value_types import PyObject

CONTAINERS = (list, dict, set, OrderedDict, defaultdict, Counter, deque, bytearray)
"""The tables of ``nn.Module`` (parameters, submodules, hooks) are among them."""
_BASES = (OrderedDict, dict, list, set, deque, bytearray)
"""Base classes whose methods are called; a ``Counter`` is a dict here, whose ``update`` does not add counts."""
_OPEN = (types.SimpleNamespace, UserDict, UserList)
"""Classes of Python's library whose instances hold a user's values."""


def foreign(name: str) -> bool:
    """Whether a module is Python's, PyTorch's or moeopt's, so that its objects are not the user's."""
    top = name.partition(".")[0]
    return top in ("torch", "moeopt", "numpy") or (top in sys.stdlib_module_names and top != "__main__")


def is_container(value: PyObject) -> bool:
    """Whether ``value`` is a container that a forward may write to: a built-in one, or one of a user's class.

    A proxy reports the ``__class__`` of its target and is no container: ``type(value)`` decides.
    """
    cls = type(value)
    return cls in CONTAINERS or (issubclass(cls, _BASES) and not foreign(cls.__module__))


def is_open(value: PyObject) -> bool:
    """Whether the attributes of ``value`` may be the user's."""
    return not foreign(type(value).__module__) or isinstance(value, _OPEN)


def copied(container: PyObject) -> PyObject:
    """A copy of the items, as :func:`put_back` takes them."""
    base = _base(container)
    if type(container) in CONTAINERS:
        return container.copy()
    return dict(base.items(container)) if issubclass(base, dict) else list(base.__iter__(container))


def parts(container: PyObject) -> list[Any]:
    """The items of a container; of a dict the values."""
    base = _base(container)
    return list(base.values(container) if issubclass(base, dict) else base.__iter__(container))


def put_back(container: PyObject, held: PyObject) -> None:
    """Make the items of ``container`` those of ``held``."""
    if same_items(container, held):
        return
    base = _base(container)
    same_size = base.__len__(container) == len(held)
    if same_size and issubclass(base, dict) and all(map(is_, base.__iter__(container), held)):
        for name, value in held.items():  # the names stay in place, since other threads may read the dict
            if base.__getitem__(container, name) is not value:
                base.__setitem__(container, name, value)
    else:
        base.clear(container)
        (base.update if issubclass(base, (dict, set)) else base.extend)(container, held)


def same_items(now: PyObject, before: PyObject) -> bool:
    """Whether two containers hold the same objects under the same names, in the same order."""
    base = _base(now)
    if base.__len__(now) != len(before) or not all(map(is_, base.__iter__(now), before)):
        return False
    return not issubclass(base, dict) or all(map(is_, base.values(now), before.values()))


def _base(container: PyObject) -> PyObject:
    cls = type(container)
    return cls if cls in _BASES else next(base for base in _BASES if issubclass(cls, base))


def table_of(value: PyObject) -> dict[str, Any] | None:
    """The ``__dict__`` of an object; None where it has none."""
    try:
        table = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return table if isinstance(table, dict) else None


def slots_of(value: PyObject) -> Iterator[tuple[Any, Any]]:
    """(descriptor, value or ``EMPTY``) of each slot of an object; see :func:`refill`."""
    for cls in type(value).__mro__:
        if "__slots__" in vars(cls) and not foreign(cls.__module__):
            for slot in vars(cls).values():
                if isinstance(slot, types.MemberDescriptorType):
                    try:
                        yield slot, slot.__get__(value)
                    except AttributeError:
                        yield slot, EMPTY


EMPTY = object()
"""The value of a slot that is not set."""


def refill(value: PyObject, slot: PyObject, held: PyObject) -> None:
    """Set a slot to the value that it had."""
    now = slot.__get__(value) if _filled(value, slot) else EMPTY
    if now is held:
        return
    if held is EMPTY:
        slot.__delete__(value)
    else:
        slot.__set__(value, held)


def _filled(value: PyObject, slot: PyObject) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True

"""The plain attributes in which alike layers differ: what the traced layer reads of them is noted.

A layer's number in its model (``layer_idx``) differs in all layers and tells each its own slot of a key/value cache. A
traced layer with a cache therefore gets a :class:`LayerNumber` for it, and the cache may ask which number that is; any
other use of it is noted, as a read of any other attribute is: by name, or from the table of them all
(``vars(self)["layer_idx"]``). An attribute that is an int in one layer and None in
another is none: ``is None`` could not be noted.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import nn

from moeopt.lower.layer_calls import NotStampable
from moeopt.value_types import PyObject

AttributePlace = tuple[str, str]
"""(path of a module in a layer, name of its attribute)."""


class LayerNumber:
    """An int attribute that knows where it was read; all but ``held`` tells ``use`` first, then is the int's own.

    ``isinstance(number, int)`` holds, so that a model's checks of its arguments go the way that they go for an int.
    """

    def __init__(self, held: int, at: AttributePlace, use: Callable[[AttributePlace], None]) -> None:
        self.held, self.at, self._use = held, at, use

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int

    def __getattr__(self, name: str) -> PyObject:
        self._use(self.at)
        return getattr(self.held, name)


def _used(name: str) -> Callable[..., Any]:
    """A special method of int; with an operand of another type (``1.0 + number``) the operator asks that type too."""
    forward, reflected = getattr(operator, name, None), getattr(operator, f"__{name[3:]}", None)

    def method(self: LayerNumber, *args: PyObject) -> PyObject:
        self._use(self.at)
        found = getattr(self.held, name)(*args)
        if found is not NotImplemented or len(args) != 1:
            return found
        if forward is not None:
            return forward(self.held, args[0])
        return found if reflected is None else reflected(args[0], self.held)

    return method


_ITS_OWN = ("__new__", "__init__", "__class__", "__getattribute__", "__getattr__", "__setattr__", "__delattr__")
for _name in dir(int):
    if _name.startswith("__") and callable(getattr(int, _name)) and _name not in _ITS_OWN:
        setattr(LayerNumber, _name, _used(_name))


def held_at(layer: nn.Module, at: AttributePlace) -> PyObject:
    """What the attribute of a layer is."""
    return _table(layer.get_submodule(at[0]))[at[1]]


class NotingTable(MutableMapping[str, Any]):
    """The attributes of a module as its own table, which tells ``note`` the name of each whose value is asked.

    ``isinstance(table, dict)`` holds, for code that checks.
    """

    def __init__(self, table: dict[str, Any], note: Callable[[str], None]) -> None:
        self._table, self._note = table, note

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return dict

    def __getitem__(self, name: str) -> PyObject:
        self._note(name)
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __setitem__(self, name: str, value: PyObject) -> None:
        self._table[name] = value

    def __delitem__(self, name: str) -> None:
        del self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return repr(self.copy())

    def __or__(self, other: dict[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: dict[str, Any]) -> dict[str, Any]:
        return {**other, **self}

    def copy(self) -> dict[str, Any]:
        return dict(self.items())


def _table(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, also of a watched one."""
    found: dict[str, Any] = vars(nn.Module)["__dict__"].__get__(module)
    return found


class _Untold:
    """The first base of a class that is made for a trace: Python tells this one of it, and none of the user's, as
    transformers' layers would be, which wrap the ``forward`` of a class that is made of them."""

    def __init_subclass__(cls) -> None:
        pass


@contextlib.contextmanager
def watched(
    layer: nn.Module,
    places: frozenset[AttributePlace],
    read: Callable[[AttributePlace, Any], Any],
    reads: Callable[[], set[AttributePlace] | None],
) -> Iterator[None]:
    """While open, these attributes of ``layer`` are what ``read(place, value)`` gives.

    Args:
        reads: where to note a place that is read from a module's table; None while no layer is traced.

    Each module that holds one has a class of its own meanwhile.

    Raises:
        NotStampable: a module's class has a metaclass, which would notice.
    """
    of_layer = type(layer)
    by_path: dict[str, list[str]] = {}
    for path, name in places:
        by_path.setdefault(path, []).append(name)
    classes: dict[nn.Module, type] = {}
    try:
        for path, own in by_path.items():
            module = layer.get_submodule(path)
            kind = type(module)
            if type(kind) is not type:
                raise NotStampable(of_layer, "its class would notice a class that is made of it")
            asked: dict[str, Any] = {name: _asking((path, name), read) for name in own}
            asked["__dict__"] = _noting(path, frozenset(own), reads)
            asked |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            module.__class__ = type(kind.__name__, (_Untold, kind), asked)
            classes[module] = kind
        yield
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


def is_watching(cls: type) -> bool:
    """Whether a class is one that :func:`watched` made."""
    return isinstance(vars(cls).get("__dict__"), property)


def _asking(at: AttributePlace, read: Callable[[AttributePlace, Any], Any]) -> property:
    def get(module: nn.Module) -> PyObject:
        return read(at, _table(module)[at[1]])

    def put(module: nn.Module, value: PyObject) -> None:
        _table(module)[at[1]] = value

    return property(get, put)


def _noting(path: str, names: frozenset[str], reads: Callable[[], set[AttributePlace] | None]) -> property:
    """The ``__dict__`` of the module at ``path``, whose attributes ``names`` are watched."""

    def get(module: nn.Module) -> PyObject:
        table, noted = _table(module), reads()
        if noted is None:
            return table
        return NotingTable(table, lambda name: noted.add((path, name)) if name in names else None)

    return property(get)

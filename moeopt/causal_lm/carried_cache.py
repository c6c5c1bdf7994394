"""A ``DynamicCache`` as the object that decoder layers hand on, for :mod:`moeopt.lower.carried_state`.

A layer that is traced may call methods of the cache with its own number, and index ``cache.layers`` with it. All else
(the length of another layer's keys, a walk over the layers) is told as a reach without a number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from moeopt.causal_lm.layers import fill_layer, parts_of
from moeopt.lower.plain_attributes import LayerNumber
from moeopt.value_types import PyObject

SlotOf = Callable[[LayerNumber | None], int]


class CarriedCache:
    """How the layers of a ``DynamicCache`` are reached; see :class:`moeopt.lower.carried_state.Carrier`."""

    def is_one(self, leaf: PyObject) -> bool:
        from transformers import DynamicCache

        return type(leaf) is DynamicCache

    def parts(self, held: PyObject, slot: int) -> list[Tensor]:
        return list(parts_of(held.layers[slot]).values()) if slot < len(held.layers) else []

    def put(self, held: PyObject, slot: int, parts: Sequence[Tensor]) -> None:
        layer = held.layers[slot]
        fill_layer(layer, dict(zip(parts_of(layer), parts, strict=True)))

    def contents(self, held: PyObject) -> list[list[Any]]:
        return [_contents(layer) for layer in held.layers]

    def beside(self, held: PyObject) -> list[Any]:
        return [
            each for name, value in vars(held).items() if name != "layers" for each in (name, value, *_inside(value))
        ]

    @contextlib.contextmanager
    def by_number(self, held: PyObject, slot_of: SlotOf) -> Iterator[None]:
        layers = held.layers
        view = _Layers(layers, slot_of)
        held.layers = view
        names = [name for name, _ in inspect.getmembers(type(held), inspect.isfunction) if not name.startswith("__")]
        for name in names:
            held.__dict__[name] = _by_number(getattr(held, name), view)
        try:
            yield
        finally:
            for name in names:
                held.__dict__.pop(name, None)
            if held.layers is view:
                held.layers = layers
            layers[:] = list.__iter__(view)


class _Layers(list[Any]):
    """The layers of a cache, reached by number; ``open`` while a method of the cache itself walks them."""

    def __init__(self, layers: Sequence[Any], slot_of: SlotOf) -> None:
        super().__init__(layers)
        self.slot_of, self.open = slot_of, False

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        before, self.open = self.open, True
        try:
            yield
        finally:
            self.open = before

    def __getitem__(self, key: PyObject) -> PyObject:
        if not self.open:
            with self.opened():
                key = self.slot_of(key if type(key) is LayerNumber else None)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        if not self.open:
            self.slot_of(None)
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        return iter([*self][::-1])

    def copy(self) -> list[Any]:
        return [*self]

    def __len__(self) -> int:
        if not self.open:
            self.slot_of(None)
        return super().__len__()


def _by_number(method: Callable[..., Any], layers: _Layers) -> Callable[..., Any]:
    """A method of the cache that takes a layer's number."""

    @functools.wraps(method)
    def call(*args: PyObject, **kwargs: PyObject) -> PyObject:
        if layers.open:
            return method(*args, **kwargs)
        numbers = [a for a in (*args, *kwargs.values()) if type(a) is LayerNumber]
        with layers.opened():
            if not numbers:
                layers.slot_of(None)
            for number in numbers:
                layers.slot_of(number)

            def plain(value: PyObject) -> PyObject:
                return value.held if type(value) is LayerNumber else value

            return method(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return call


def _contents(layer: PyObject) -> list[Any]:
    """What a layer of a cache keeps: its parts, then all else."""
    parts = parts_of(layer)
    held = {id(part) for part in parts.values()}
    rest: list[Any] = list(parts)
    for name, value in vars(layer).items():
        items = _inside(value) if isinstance(value, dict) else [value]
        rest += [name, *(v for v in items if id(v) not in held)]
    return [*parts.values(), *rest]


def _inside(value: PyObject) -> list[Any]:
    """The keys and values of a dict, the items of another container."""
    if isinstance(value, dict):
        return [v for pair in value.items() for v in pair]
    return list(value) if isinstance(value, (list, tuple, set)) else []

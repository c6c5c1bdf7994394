"""State that layers hand on beside their arguments: one object (a key/value cache) with a slot for each layer.

A layer finds its slot by its own number, reads the tensors there and puts others in their place. In a trace with stamps
the tensors of the slot are arguments and results of the layer's call, so that a stamped layer works on a slot of its
own. A layer that reaches into the object otherwise is not stamped.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.lower.layer_calls import PLAIN, NotStampable, open_sizes
from moeopt.lower.plain_attributes import AttributePlace, LayerNumber, held_at
from moeopt.value_types import PyObject


class Carrier(Protocol):
    """How the slots of such an object are reached; ``held`` is the object."""

    def is_one(self, leaf: PyObject) -> bool:
        """Whether an argument is such an object."""

    def parts(self, held: PyObject, slot: int) -> list[Tensor]:
        """The tensors of a slot; none where there is no such slot, or nothing in it."""

    def put(self, held: PyObject, slot: int, parts: Sequence[Tensor]) -> None:
        """Put tensors in the place of :meth:`parts`."""

    def contents(self, held: PyObject) -> list[list[Any]]:
        """All that each slot keeps: its parts, then other objects."""

    def beside(self, held: PyObject) -> list[Any]:
        """All that the object keeps beside its slots (an attribute that a model's code set on it)."""

    def by_number(
        self, held: PyObject, slot_of: Callable[[LayerNumber | None], int]
    ) -> contextlib.AbstractContextManager[None]:
        """While open, whoever reaches for a slot asks ``slot_of(number)``, or ``slot_of(None)`` where by no number.

        ``slot_of`` may raise, and may put parts into the slot first.
        """


CARRIED = "<carried>"


def one_carried(call: PyObject, carrier: Carrier | None) -> tuple[Any, Any]:
    """A call with a word in the place of the one carried object among its arguments, and that object or None."""
    if carrier is None:
        return call, None
    leaves, spec = pytree.tree_flatten(call, is_leaf=carrier.is_one)
    found = [leaf for leaf in leaves if carrier.is_one(leaf)]
    if not found or any(leaf is not found[0] for leaf in found):
        return call, None
    return pytree.tree_unflatten([CARRIED if leaf is found[0] else leaf for leaf in leaves], spec), found[0]


def put_back(call: PyObject, held: PyObject) -> PyObject:
    """A call that :func:`one_carried` gave, with the object in the place of its word."""
    return pytree.tree_map_only(str, lambda leaf: held if leaf == CARRIED else leaf, call)


@dataclass(frozen=True)
class StampedSlot:
    """The slot of a stamped layer: the tensors that its call reads, and where those go that the call gives."""

    parts: list[Tensor]
    put: Callable[[Sequence[Tensor]], None]


class SlotCall:
    """What the traced layer of a kind does with the carried object: its slot, and the numbers by which it found it.

    Args:
        cls: the layer's class, for messages.
        call: the layer's arguments without the object.
        mark: marks the tensors of the slot as arguments of the layer's call.
    """

    def __init__(
        self, carrier: Carrier, held: PyObject, cls: type, call: PyObject, mark: Callable[[list[Tensor]], list[Tensor]]
    ) -> None:
        self._carrier, self._held, self._cls, self._call, self._mark = carrier, held, cls, call, mark
        self._beside = carrier.beside(held)
        self._slot: int | None = None
        self._numbers: set[AttributePlace] = set()
        self._before: list[Tensor] = []
        self._marked: list[Tensor] = []
        self._versions: list[int] = []
        self._apart: list[set[int]] = []
        self._replaced: list[int] = []

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        """While open, the layer runs.

        Raises:
            NotStampable: it did something else with the object than to read and to fill its own slot.
        """
        contents = self._carrier.contents(self._held)
        with self._carrier.by_number(self._held, self._slot_of):
            yield
        if not _all_same(self._beside, self._carrier.beside(self._held)):
            raise NotStampable(self._cls, "it sets an attribute of its cache")
        now = self._carrier.contents(self._held)
        count = len(self._before)
        for slot, (old, new) in enumerate(itertools.zip_longest(contents, now)):
            first = count if slot == self._slot else 0
            if old is None or new is None or len(old) != len(new) or not _all_same(old[first:], new[first:]):
                raise NotStampable(self._cls, "it writes to its cache otherwise than into its own slot")
        if [t._version for t in self._marked] != self._versions:
            raise NotStampable(self._cls, "it writes to the tensors of its cache")

    def _slot_of(self, number: LayerNumber | None) -> int:
        if number is None or self._slot not in (None, number.held):
            raise NotStampable(self._cls, "it looks at more of its cache than its own slot")
        self._numbers.add(number.at)
        if self._slot is None:
            self._slot, self._before = number.held, self._carrier.parts(self._held, number.held)
            if not self._before:
                raise NotStampable(self._cls, "its slot of the cache is empty")
            self._apart = [_sizes_apart(t, self._call) for t in self._before]
            self._marked = self._mark(self._before)
            self._versions = [t._version for t in self._marked]
            self._carrier.put(self._held, self._slot, self._marked)
        return number.held

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that the layer read in its slot, and those that it put there instead."""
        if self._slot is None:
            return [], []
        now = self._carrier.parts(self._held, self._slot)
        self._replaced = [n for n, t in enumerate(now) if t is not self._marked[n]]
        return self._marked, [now[n] for n in self._replaced]

    def put(self, results: Sequence[Tensor]) -> None:
        """Put ``results``, which stand for the second of :meth:`results`, into the slot."""
        if self._slot is not None:
            self._put(self._held, self._slot, self._before, results)

    def _put(self, held: PyObject, slot: int, before: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        parts = list(before)
        for n, result in zip(self._replaced, results, strict=True):
            parts[n] = result
        self._carrier.put(held, slot, parts)

    def like_it(self, layer: nn.Module, held: PyObject, call: PyObject) -> StampedSlot | None:
        """The slot of another layer whose ``call`` is alike; None where its tensors are not like those of this one.

        Sizes of the slot that the traced layer's call made equal to sizes of its arguments (the rows of the cache and
        of the hidden states) become equal for the other layer too, as its own code would have it.
        """
        if not _all_same(self._beside, self._carrier.beside(held)):  # which the traced layer may have read
            return None
        if self._slot is None:
            return StampedSlot([], lambda results: None)
        numbers = {held_at(layer, at) for at in self._numbers}
        if len(numbers) != 1 or (slot := numbers.pop()) < 0:
            return None
        parts = self._carrier.parts(held, slot)
        if len(parts) != len(self._before) or not all(map(_same_kind, parts, self._before)):
            return None
        if _shared([*_tensors(call), *parts]) != _shared([*_tensors(self._call), *self._before]):
            return None
        equal: list[tuple[Any, Any]] = []
        joined = open_sizes(self._call)
        for part, mine, apart in zip(parts, self._before, self._apart, strict=True):
            own = _sizes_apart(part, call)
            for n, (size, settled) in enumerate(zip(part.shape, mine.shape, strict=True)):
                if str(size) == str(settled):
                    continue
                if n not in apart or n not in own or str(settled) not in joined:
                    return None
                equal.append((size, settled))
        for size, settled in equal:
            torch._check(size == settled)
        if list(map(_sizes, parts)) != list(map(_sizes, self._before)):
            return None
        return StampedSlot(parts, lambda results: self._put(held, slot, parts, results))


def _sizes_apart(t: Tensor, call: PyObject) -> set[int]:
    """The axes of a tensor whose size is free, and is no size of ``call``."""
    known = open_sizes(call)
    return {n for n, size in enumerate(t.shape) if str(size).isidentifier() and str(size) not in known}


def _tensors(call: PyObject) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def _all_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: PyObject, b: PyObject) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and bool(a == b))


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.dim(), a.layout) == (b.dtype, b.device, b.dim(), b.layout)


def _shared(tensors: Sequence[Tensor]) -> list[int]:
    """Which tensors are of one memory."""
    first: dict[int, int] = {}
    return [first.setdefault(t.untyped_storage()._cdata, n) for n, t in enumerate(tensors)]


def _sizes(t: Tensor) -> list[str]:
    return [str(size) for size in (*t.shape, *t.stride(), t.storage_offset())]

"""Alike layers while a model is traced: the first of a kind runs between two marks, the others as one op each.

    y = layer0(x)          ->   xs = mark([x], kind, False);  ys = layer0(xs);  y = mark(ys, kind, True)
    y = layer1(x)          ->   y = stamp([x], kind, 1)                       no code of layer 1 runs

:mod:`stamp_graph` puts the nodes between the marks in the place of each stamp, on that layer's weights. A trace costs
some milliseconds for each op that the model's code calls, so that sixty alike layers cost sixty times one; a stamp is
one op. A layer is stamped only if all of this holds; where the first of a kind turns out otherwise, the trace begins
again with layers of its class left as they are:

    the calls are alike    plain arguments are equal, tensors agree in dtype, symbolic sizes, strides and aliasing
    nothing else is read   plain attributes in which the layers differ were not read by the first, and what the
                           Python modules of its code hold at the top is what it was then
    the same code runs     with values, its code calls the ops that the first one's calls (:mod:`layer_runs`)
    nothing else happens   it returned fresh tensors, wrote to no argument, weight or attribute, and no value leaks

A key/value cache among the arguments is a :mod:`carried` object: what a layer reads and puts into its own slot of it,
which it finds by its own number, are arguments and results more (the slot is marked where the layer reaches for it).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.lower.alike_layers import Likeness, repeated_modules, weights_by_name
from moeopt.lower.carried_state import Carrier, SlotCall, one_carried, put_back
from moeopt.lower.layer_calls import (
    NotStampable,
    attributes,
    described,
    more_than_tensors,
    open_sizes,
    replaced_forward,
    same_attributes,
)
from moeopt.lower.layer_runs import OpWords, layer_runs
from moeopt.lower.module_state import module_state
from moeopt.lower.plain_attributes import AttributePlace, LayerNumber, watched
from moeopt.value_types import PyObject

_numbers = itertools.count()


@dataclass
class Kind:
    """A layer that was traced, and its call: what other layers' calls are held against.

    Attributes:
        cls: the layer's own class; while it is traced it may have one that notes reads.
        call: its arguments, with a word in the place of a cache.
        sizes: how many free sizes these had as the call began.
        around: the values at the top of Python modules as the call began, as :func:`module_state` has them.
        outputs: the tensors that it returned, then those that it put into its slot: ``moeopt::stamp`` gives their like.
        returned: how many it returned.
        result: what it returned, a number of ``outputs`` in the place of each tensor.
        read: its plain attributes that were read, as (path of the module, name).
        slot: what it did with a cache among its arguments.
    """

    path: str
    layer: nn.Module
    cls: type
    call: PyObject
    sizes: int
    around: list[Any]
    number: int = field(default_factory=_numbers.__next__)
    outputs: list[Tensor] = field(default_factory=list)
    returned: int = 0
    result: PyObject = None
    read: set[AttributePlace] = field(default_factory=set)
    slot: SlotCall | None = None

    def called_like(self, call: PyObject) -> bool:
        """Whether a call, as :func:`described`, is like this one.

        Both are told in the sizes of now: a trace renames a size that it finds equal to another (the past of a mask and
        of each layer's cache). A call that made two sizes of its arguments equal is like no later one.
        """
        now = described(*self.call)
        return now is not None and now[0] == call and len(open_sizes(self.call)) == self.sizes


@dataclass(frozen=True)
class Leaf:
    """The place of a tensor among the tensors of a structure."""

    number: int


_KINDS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Stamps:
    """The alike layers of ``model``, while :meth:`during` is open.

    Args:
        carrier: knows the caches that layers are given; None: a layer that is given one is traced.

    Attributes:
        left_alone: classes whose layers are traced each.
        fresh: called when a trace begins.
        kinds: by number.
        layers: the paths of the stamped layers; ``moeopt::stamp`` holds an index of it.
        calls: every call of an alike layer in the trace, as (path, the kind's number; None: as its code has it).
    """

    def __init__(
        self,
        model: nn.Module,
        left_alone: frozenset[type] = frozenset(),
        fresh: Callable[[], None] = lambda: None,
        carrier: Carrier | None = None,
    ) -> None:
        self.model, self.left_alone, self._fresh, self._carrier = model, left_alone, fresh, carrier
        self.kinds: dict[int, Kind] = {}
        self.layers: list[str] = []
        self.calls: list[tuple[str, int | None]] = []
        self._candidates = {p: m for p, m in repeated_modules(model).items() if type(m) not in left_alone}
        self._classes = {p: type(m) for p, m in self._candidates.items()}
        self._like = Likeness(self._candidates)
        self._inside: Kind | None = None
        self._thread = 0

    def forget(self) -> None:
        """Forget what was traced: a trace begins."""
        self.kinds, self.layers, self.calls = {}, [], []
        self._fresh()

    @contextlib.contextmanager
    def during(self) -> Iterator[Stamps]:
        """While open, calls of alike layers run as marked or stamped."""
        self.forget()
        self._thread = threading.get_ident()
        with contextlib.ExitStack() as undo:
            for path, layer in self._candidates.items():
                if self._like.has_like(path):
                    undo.enter_context(replaced_forward(layer, self._instead(path, layer)))
                    undo.enter_context(watched(layer, self._like.differing(path), self._read, self._reads))
            yield self

    def unlike(self, run: Callable[[], PyObject]) -> frozenset[type]:
        """The classes of layers for which a stamp cannot stand: with values, one runs otherwise than its kind does.

        Args:
            run: calls the model with values, as it was called for the trace; where it cannot, nothing is stamped.
        """
        if not self.layers:
            return frozenset()
        try:
            runs = layer_runs({path: self._candidates[path] for path, _ in self.calls}, self._carrier, run)
        except Exception:  # of the model's own code
            runs = []
        runs *= len(self.calls) // max(len(runs), 1)  # a trace may call the model more than once
        if [path for path, _ in self.calls] != [path for path, _ in runs]:
            return frozenset(kind.cls for kind in self.kinds.values())
        first: dict[int, OpWords] = {}
        return frozenset(
            self.kinds[number].cls
            for (_, number), (_, words) in zip(self.calls, runs, strict=True)
            if number is not None and first.setdefault(number, words) != words
        )

    def _instead(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward
        return lambda *args, **kwargs: self._call(path, layer, forward, args, kwargs)

    def _traced_now(self) -> Kind | None:
        """The kind whose layer runs now, on the thread of the trace."""
        return self._inside if self._thread == threading.get_ident() else None

    def _reads(self) -> set[AttributePlace] | None:
        kind = self._traced_now()
        return None if kind is None else kind.read

    def _read(self, at: AttributePlace, value: PyObject) -> PyObject:
        kind = self._traced_now()
        if kind is None:
            return value
        if kind.slot is not None and self._like.are_numbers(kind.path, at):
            return LayerNumber(value, at, kind.read.add)
        kind.read.add(at)
        return value

    def _call(
        self, path: str, layer: nn.Module, forward: Callable[..., Any], args: PyObject, kwargs: PyObject
    ) -> PyObject:
        traced = self._thread == threading.get_ident() and self._inside is None  # others may call the model meanwhile
        if not traced:
            return forward(*args, **kwargs)
        (plain, options), cache = one_carried((args, kwargs), self._carrier)
        found = described(plain, options)
        if found is None:
            self.calls.append((path, None))
            return forward(*args, **kwargs)
        call, tensors = found
        around = module_state(layer)
        for kind in self.kinds.values():
            if not kind.called_like(call) or kind.around != around or not self._like(kind.path, path, kind.read):
                continue
            slot = None if kind.slot is None else kind.slot.like_it(layer, cache, (plain, options))
            if kind.slot is not None and slot is None:
                continue
            self.layers.append(path)
            self.calls.append((path, kind.number))
            given = tensors if slot is None else [*tensors, *slot.parts]
            made = torch.ops.moeopt.stamp(given, kind.number, len(self.layers) - 1)
            if slot is not None:
                slot.put(made[kind.returned :])
            return _filled(kind.result, made)
        kind = Kind(path, layer, self._classes[path], (plain, options), len(open_sizes((plain, options))), around)
        _KINDS[kind.number] = kind
        self.calls.append((path, kind.number))
        result = self._marked(kind, forward, tensors, cache)
        self.kinds[kind.number] = kind
        return result

    def _marked(self, kind: Kind, forward: Callable[..., Any], tensors: list[Tensor], cache: PyObject) -> PyObject:
        """The first call of a kind, between two marks."""
        before = attributes(kind.layer)
        inputs = iter(torch.ops.moeopt.mark(tensors, kind.number, False))
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(inputs), kind.call)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if cache is not None and self._carrier is not None:
            kind.slot = SlotCall(
                self._carrier,
                cache,
                kind.cls,
                kind.call,
                lambda parts: torch.ops.moeopt.mark(parts, kind.number, False),
            )
            args, kwargs = put_back((args, kwargs), cache)
        held = [*given, *weights_by_name(kind.layer).values()]
        versions, structure = [t._version for t in held], self._structure((args, kwargs))
        self._inside = kind
        try:
            with contextlib.nullcontext() if kind.slot is None else kind.slot.during():
                result = forward(*args, **kwargs)
        finally:
            self._inside = None
        leaves, spec = pytree.tree_flatten(result)
        made = [t for t in leaves if isinstance(t, Tensor)]
        read, put = ([], []) if kind.slot is None else kind.slot.results()
        why = more_than_tensors([*leaves, *put], [*made, *put], [*held, *read])
        if [t._version for t in held] != versions or self._structure((args, kwargs)) != structure:
            why = "it writes to its arguments or weights"
        if not same_attributes(before, attributes(kind.layer)):
            why = "it writes to its attributes"
        if why:
            raise NotStampable(kind.cls, why)
        number = itertools.count()
        places = [Leaf(next(number)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kind.outputs, kind.returned, kind.result = [*made, *put], len(made), pytree.tree_unflatten(places, spec)
        ends = torch.ops.moeopt.mark(kind.outputs, kind.number, True)
        if kind.slot is not None:
            kind.slot.put(ends[len(made) :])
        return _filled(kind.result, ends)

    def _structure(self, call: PyObject) -> PyObject:
        return pytree.tree_structure(call, is_leaf=None if self._carrier is None else self._carrier.is_one)


def _filled(result: PyObject, tensors: Sequence[Tensor]) -> PyObject:
    return pytree.tree_map_only(Leaf, lambda leaf: tensors[leaf.number], result)


def _mark_fake(xs: Sequence[Tensor], kind: int, end: bool) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in xs]


def _stamp_fake(xs: Sequence[Tensor], kind: int, number: int) -> list[Tensor]:
    return _mark_fake(_KINDS[kind].outputs, kind, True)


_LIB = torch.library.Library("moeopt", "FRAGMENT")
_LIB.define("mark(Tensor[] xs, int kind, bool end) -> Tensor[]")
_LIB.define("stamp(Tensor[] xs, int kind, int number) -> Tensor[]")
torch.library.register_fake("moeopt::mark", _mark_fake, lib=_LIB)
torch.library.register_fake("moeopt::stamp", _stamp_fake, lib=_LIB)

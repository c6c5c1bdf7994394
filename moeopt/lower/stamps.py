"""Alike layers while a model is traced: the first of a kind runs between two marks, the others as one op each.

    y = layer0(x)          ->   xs = mark([x], kind, False);  ys = layer0(xs);  y = mark(ys, kind, True)
    y = layer1(x)          ->   y = stamp([x], kind, 1)                       no code of layer 1 runs

:mod:`stamp_graph` puts the nodes between the marks in the place of each stamp, on that layer's weights. A trace costs
some milliseconds for each op that the model's code calls, so that sixty alike layers cost sixty times one; a stamp is
one op. A layer is stamped only if all of this holds; where the first of a kind turns out otherwise, the trace begins
again with layers of its class left as they are:

    the calls are alike    plain arguments are equal, tensors agree in dtype, symbolic sizes, strides and aliasing
    nothing else is read   plain attributes in which the layers differ were not read by the first
    nothing else happens   it returned fresh tensors, wrote to no argument, weight or attribute, and no value leaks
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

from moeopt.lower.alike_layers import differences, repeated_modules, weights_by_name
from moeopt.lower.layer_calls import attributes, described, more_than_tensors, same_attributes
from moeopt.value_types import PyObject

_numbers = itertools.count()


class NotStampable(BaseException):  # no ``except Exception`` of a model's own catches it
    """A layer's call did more than make tensors of its arguments and weights; ``kind`` is the layer's class."""

    def __init__(self, kind: type, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@dataclass
class Kind:
    """A layer that was traced, and its call: what other layers' calls are held against.

    Attributes:
        cls: the layer's own class; while it is traced it may have one that notes reads.
        outputs: the tensors that it returned, as ``moeopt::stamp`` gives their like.
        result: what it returned, a number of ``outputs`` in the place of each tensor.
        read: its plain attributes that were read, as (path of the module, name).
    """

    path: str
    layer: nn.Module
    cls: type
    call: Any
    number: int = field(default_factory=_numbers.__next__)
    outputs: list[Tensor] = field(default_factory=list)
    result: Any = None
    read: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True)
class Leaf:
    """The place of a tensor among the tensors of a structure."""

    number: int


_KINDS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Stamps:
    """The alike layers of ``model``, while :meth:`during` is open.

    Attributes:
        left_alone: classes whose layers are traced each.
        fresh: called when a trace begins.
        kinds: by number.
        layers: the paths of the stamped layers; ``moeopt::stamp`` holds an index of it.
    """

    def __init__(
        self,
        model: nn.Module,
        left_alone: frozenset[type] = frozenset(),
        fresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.left_alone, self._fresh = model, left_alone, fresh
        self.kinds: dict[int, Kind] = {}
        self.layers: list[str] = []
        self._candidates = {p: m for p, m in repeated_modules(model).items() if type(m) not in left_alone}
        self._classes = {p: type(m) for p, m in self._candidates.items()}
        self._like = _Likeness(self._candidates)
        self._inside = False
        self._thread = 0

    def forget(self) -> None:
        """Forget what was traced: a trace begins."""
        self.kinds, self.layers = {}, []
        self._fresh()

    @contextlib.contextmanager
    def during(self) -> Iterator[Stamps]:
        """While open, calls of alike layers run as marked or stamped."""
        self.forget()
        self._thread = threading.get_ident()
        with contextlib.ExitStack() as undo:
            for path, layer in self._candidates.items():
                if self._like.has_like(path):
                    undo.enter_context(self._instead(path, layer))
                    undo.enter_context(_watched(layer, self._like.differing(path), self._note))
            yield self

    @contextlib.contextmanager
    def _instead(self, path: str, layer: nn.Module) -> Iterator[None]:
        forward, held = layer.forward, layer.__dict__.get("forward")

        def instead(*args: PyObject, **kwargs: PyObject) -> PyObject:
            return self._call(path, layer, forward, args, kwargs)

        layer.__dict__["forward"] = instead
        try:
            yield
        finally:
            layer.__dict__["forward"] = held
            if held is None:
                del layer.__dict__["forward"]

    def _note(self, path: str, name: str) -> None:
        if self._inside and self._thread == threading.get_ident():
            self._reads.add((path, name))

    def _call(
        self, path: str, layer: nn.Module, forward: Callable[..., Any], args: PyObject, kwargs: PyObject
    ) -> PyObject:
        traced = self._thread == threading.get_ident() and not self._inside  # others may call the model meanwhile
        found = described(args, kwargs) if traced else None
        if found is None:
            return forward(*args, **kwargs)
        call, tensors = found
        for kind in self.kinds.values():
            if kind.call == call and self._like(kind.path, path, kind.read):
                self.layers.append(path)
                return _filled(kind.result, torch.ops.moeopt.stamp(tensors, kind.number, len(self.layers) - 1))
        kind = Kind(path, layer, self._classes[path], call)
        _KINDS[kind.number] = kind
        result = self._marked(kind, forward, (args, kwargs), tensors)
        self.kinds[kind.number] = kind
        return result

    def _marked(self, kind: Kind, forward: Callable[..., Any], call: PyObject, tensors: list[Tensor]) -> PyObject:
        """The first call of a kind, between two marks."""
        before = attributes(kind.layer)
        inputs = iter(torch.ops.moeopt.mark(tensors, kind.number, False))
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(inputs), call)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = [*given, *weights_by_name(kind.layer).values()]
        versions, structure = [t._version for t in held], pytree.tree_structure((args, kwargs))
        self._inside, self._reads = True, kind.read
        try:
            result = forward(*args, **kwargs)
        finally:
            self._inside = False
        leaves, spec = pytree.tree_flatten(result)
        made = [t for t in leaves if isinstance(t, Tensor)]
        why = more_than_tensors(leaves, made, held)
        if [t._version for t in held] != versions or pytree.tree_structure((args, kwargs)) != structure:
            why = "it writes to its arguments or weights"
        if not same_attributes(before, attributes(kind.layer)):
            why = "it writes to its attributes"
        if why:
            raise NotStampable(kind.cls, why)
        number = itertools.count()
        places = [Leaf(next(number)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        kind.outputs, kind.result = made, pytree.tree_unflatten(places, spec)
        return _filled(kind.result, torch.ops.moeopt.mark(made, kind.number, True))


def _filled(result: PyObject, tensors: Sequence[Tensor]) -> PyObject:
    return pytree.tree_map_only(Leaf, lambda leaf: tensors[leaf.number], result)


class _Likeness:
    """Which candidates are alike, looked at once."""

    def __init__(self, candidates: dict[str, nn.Module]) -> None:
        self._group: dict[str, str] = {}
        self._differing: dict[str, frozenset[tuple[str, str]]] = {}
        self._candidates = candidates
        firsts: list[str] = []
        for path, layer in candidates.items():
            for first in firsts:
                plain = differences(candidates[first], layer)
                if plain is not None:
                    self._group[path], self._differing[path] = first, plain
                    break
            else:
                firsts.append(path)
                self._group[path], self._differing[path] = path, frozenset()

    def has_like(self, path: str) -> bool:
        return sum(first == self._group[path] for first in self._group.values()) > 1

    def differing(self, path: str) -> frozenset[tuple[str, str]]:
        """The plain attributes in which some layer of the group of ``path`` differs from the first."""
        group = [p for p, first in self._group.items() if first == self._group[path]]
        return frozenset().union(*(self._differing[p] for p in group))

    def __call__(self, traced: str, path: str, read: set[tuple[str, str]]) -> bool:
        """Whether a layer is like a traced one in all that the traced one has ``read``."""
        if self._group[traced] != self._group[path]:
            return False
        one, other = self._candidates[traced], self._candidates[path]
        return all(repr(_held(one, *at)) == repr(_held(other, *at)) for at in read)


def _held(layer: nn.Module, path: str, name: str) -> PyObject:
    value = layer.get_submodule(path).__dict__[name]
    return type(value), value


@contextlib.contextmanager
def _watched(layer: nn.Module, names: frozenset[tuple[str, str]], note: Callable[[str, str], None]) -> Iterator[None]:
    """While open, reads of these plain attributes are noted: each module has a class that asks before it answers."""
    of_layer = type(layer)
    by_path: dict[str, list[str]] = {}
    for path, name in names:
        by_path.setdefault(path, []).append(name)
    classes: dict[nn.Module, type] = {}
    try:
        for path, own in by_path.items():
            module = layer.get_submodule(path)
            kind = type(module)
            if type(kind) is not type or any("__init_subclass__" in vars(c) for c in kind.__mro__[:-1]):
                raise NotStampable(of_layer, "its class would notice a class that is made of it")
            asked: dict[str, Any] = {name: _noting(path, name, note) for name in own}
            asked |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            module.__class__ = type(kind.__name__, (kind,), asked)
            classes[module] = kind
        yield
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


def _noting(path: str, name: str, note: Callable[[str, str], None]) -> property:
    def get(module: nn.Module) -> PyObject:
        note(path, name)
        return module.__dict__[name]

    def put(module: nn.Module, value: PyObject) -> None:
        module.__dict__[name] = value

    return property(get, put)


def _mark_fake(xs: Sequence[Tensor], kind: int, end: bool) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in xs]


def _stamp_fake(xs: Sequence[Tensor], kind: int, number: int) -> list[Tensor]:
    return _mark_fake(_KINDS[kind].outputs, kind, True)


_LIB = torch.library.Library("moeopt", "FRAGMENT")
_LIB.define("mark(Tensor[] xs, int kind, bool end) -> Tensor[]")
_LIB.define("stamp(Tensor[] xs, int kind, int number) -> Tensor[]")
torch.library.register_fake("moeopt::mark", _mark_fake, lib=_LIB)
torch.library.register_fake("moeopt::stamp", _stamp_fake, lib=_LIB)

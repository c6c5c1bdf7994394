"""The addresses and layouts of all Parameters of a bank, read together.

A bank of E experts reads some 3 E tensors at each call of a GPU kernel, since only the GPU knows which experts are hit.
One by one this takes milliseconds of Python; ``map`` over all of them, which runs in C, takes a third of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from moeopt.rewrite.guard_expression import GuardExpression

_PLAIN = {Tensor, nn.Parameter}
_LAYOUT, _WITH_ADDRESS = attrgetter("layout"), {torch.strided}
_HOOKS = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")
_GEOMETRY: tuple[Callable[[Any], object], ...] = (
    Tensor.data_ptr,
    Tensor.stride,
    attrgetter("shape"),
    attrgetter("dtype"),
    attrgetter("device"),
    Tensor.is_neg,
)


class OnePlace(Protocol):
    """The place of one tensor in a module tree; see ``live_weights.Place``."""

    links: list[tuple[dict[str, Any], str, nn.Module]]
    owner: nn.Module
    registry: dict[str, Any]
    key: str


class BankLayout:
    """The places of one bank. Each place was read once by itself, and had no reason to refuse."""

    def __init__(self, places: Iterable[OnePlace]) -> None:
        places = list(places)
        links = {(id(registry), name): (registry, name, child) for p in places for registry, name, child in p.links}
        self._modules = [registry for registry, _, _ in links.values()]
        self._names = [name for _, name, _ in links.values()]
        self._children = [child for _, _, child in links.values()]
        self._owners = list({id(p.owner): p.owner for p in places if p.links}.values())  # not the block: it is called
        self._registries, self._keys = [p.registry for p in places], [p.key for p in places]

    def tensors(self) -> list[Tensor] | None:
        """Every tensor, as it is now.

        None where a module on the way to one was replaced, its owner has hooks, or it is no plain tensor: each place
        read by itself then tells the reason.
        """
        if not all(map(is_, map(dict.get, self._modules, self._names), self._children)):
            return None
        if any(any(map(hooks, self._owners)) for hooks in _HOOKS):
            return None
        tensors = cast(list[Tensor], list(map(dict.get, self._registries, self._keys)))
        plain = _PLAIN.issuperset(map(type, tensors)) and _WITH_ADDRESS.issuperset(map(_LAYOUT, tensors))
        return tensors if plain else None

    def any_wants_gradient(self) -> bool:
        """Whether a tensor at one of the places, whatever it is now, wants a gradient."""
        found = map(dict.get, self._registries, self._keys)
        return any([isinstance(t, Tensor) and t.requires_grad for t in found])

    def arm(self, guard: GuardExpression, tensors: Sequence[Tensor]) -> None:
        """Add terms that hold while every place gives a tensor (``t0``, ``t1`` ...) that lies as one of ``tensors``."""
        for registry, name, child in zip(self._modules, self._names, self._children, strict=True):
            guard.item(registry, name, child)
        for owner in self._owners:
            guard.add("not {0}._forward_hooks and not {0}._forward_pre_hooks", owner)
        for i, (registry, key, tensor) in enumerate(zip(self._registries, self._keys, tensors, strict=True)):
            guard.lies(registry, key, tensor, f"t{i}")

    @staticmethod
    def lie(tensors: list[Tensor]) -> tuple[tuple[object, ...], ...]:
        """Address, strides, shape, dtype, device and sign of every tensor."""
        return tuple([tuple(map(what, tensors)) for what in _GEOMETRY])

"""Modules that carry a recurrent state from token to token (Mamba, delta rules), found by what they do.

What they do to a cache finds them, not their name. A trace of the model stops at them: they choose in Python between a
program for one token and one for many, and a graph holds both (:mod:`~.steps`).

Shape legend: B rows, S new tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.causal_lm.layers import STATES, parts_of
from moeopt.errors import Declined
from moeopt.lower.onnx.experts_node import DOMAIN
from moeopt.value_types import PyObject

OP = "Recurrence"
"""``moeopt::Recurrence(tokens..., states...) {mixer}`` stands in a traced graph until a Scan takes its place."""


@dataclass
class Mixer:
    """A module that reads and writes recurrent states of one layer of a cache, and its call with S tokens.

    Args:
        name: its path.
        leaves: of its arguments, ``form`` their tree; ``tokens``: which are (B or 1, S, ...); ``cache``: which is it.
        ends: what it returned, ``result`` the tree of that; each tensor is (B, S, ...).
        layer: the cache's layer that it works on; ``states``: the names of its states, in order.
    """

    name: str
    module: nn.Module
    leaves: list[Any]
    form: PyObject
    tokens: list[int]
    cache: int
    ends: list[Any]
    result: PyObject
    layer: int
    states: list[str]

    def arguments(self, tokens: Sequence[Tensor], cache: PyObject) -> tuple[Any, Any]:
        """Its call with other tensors and another cache."""
        leaves = list(self.leaves)
        leaves[self.cache] = cache
        for place, tensor in zip(self.tokens, tokens, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        return args, kwargs

    def sample(self) -> tuple[list[Tensor], list[Tensor]]:
        """Its tensors (B, S, ...), and states to begin with (B, ...)."""
        held = parts_of(self.leaves[self.cache].layers[self.layer])
        states = [held[name].clone() for name in self.states]
        tokens = [self.leaves[n] for n in self.tokens]
        return [t.expand(len(states[0]), *t.shape[1:]).clone() for t in tokens], states

    def results(self, tensors: Sequence[Tensor]) -> PyObject:
        """What it returns, with other tensors."""
        left = iter(tensors)
        ends = [next(left) if isinstance(end, Tensor) else end for end in self.ends]
        return pytree.tree_unflatten(ends, self.result)


class _WatchedState(dict[int, Tensor]):
    """The states of one kind of one layer, by number; ``read`` hears of each that is read."""

    layer: int
    kind: str
    read: Callable[[int, str], None]

    def __getitem__(self, number: int) -> Tensor:
        self.read(self.layer, f"{self.kind}.{number}")
        return super().__getitem__(number)


def _watch_states(cache: PyObject, read: Callable[[int, str], None]) -> None:
    """Call ``read(layer, state)`` whenever a state of ``cache`` is read."""
    for number, layer in enumerate(cache.layers):
        for kind in STATES:
            if hasattr(layer, kind):
                watched = _WatchedState(getattr(layer, kind))
                watched.layer, watched.kind, watched.read = number, kind, read
                setattr(layer, kind, watched)


def _no_row_a_token(tokens: Sequence[Tensor], ends: Sequence[Any], size: tuple[int, int]) -> str:
    """Why a call of ``size`` = (B, S) does not go token by token, by shapes; "" where it does."""
    rule = f"that has not one row for each of {size[1]} tokens"
    for tensor in tokens:
        if tensor.dim() < 2 or tensor.shape[1] != size[1]:
            return f"takes a tensor {tuple(tensor.shape)} {rule}"
    for end in ends:
        if isinstance(end, Tensor) and tuple(end.shape[:2]) != size:
            return f"returns a tensor {tuple(end.shape)} {rule}"
    return ""


def find_mixers(model: nn.Module, run: Callable[[Any], Any], cache: PyObject, size: tuple[int, int]) -> list[Mixer]:
    """The modules of ``model`` that keep recurrent states, in the order of their calls.

    Args:
        run: calls the model on ``size`` = (B, S) new tokens with the cache that it is given.
        cache: a ``DynamicCache`` with states; it is not changed.

    Raises:
        Declined: such a module has no form that goes token by token; the message names it and says why.
    """
    from transformers import Cache

    cache = copy.deepcopy(cache)
    names = {id(module): name for name, module in model.named_modules()}
    calls: list[tuple[nn.Module, Any]] = []
    touched: dict[int, set[tuple[int, str]]] = {}
    found: list[Mixer] = []
    _watch_states(cache, lambda layer, state: touched.setdefault(id(calls[-1][0]), set()).add((layer, state)))

    def enter(module: nn.Module, args: PyObject, kwargs: PyObject) -> None:
        calls.append((module, (args, kwargs)))

    def leave(module: nn.Module, args: PyObject, result: PyObject) -> None:
        _, call = calls.pop()
        places = touched.pop(id(module), set())
        if not any(state.startswith("recurrent_states") for _, state in places):
            return
        leaves, form = pytree.tree_flatten(call, is_leaf=lambda value: isinstance(value, Cache))
        ends, tree = pytree.tree_flatten(result)
        tokens = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        caches = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Cache)]
        layers = {layer for layer, _ in places}
        if any(other.module is module for other in found):
            why = "is called twice"
        elif len(layers) != 1 or len(caches) != 1:
            why = f"works on {len(layers)} layers of {len(caches)} caches"
        else:
            why = _no_row_a_token([leaves[n] for n in tokens], ends, size)
        if why:
            raise Declined(f"{names[id(module)]} keeps a recurrent state and {why}")
        states = sorted(state for _, state in places)
        found.append(
            Mixer(names[id(module)], module, leaves, form, tokens, caches[0], ends, tree, layers.pop(), states)
        )

    hooks = [
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        )
    ]
    try:
        with torch.no_grad():
            run(cache)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def stepping(mixers: Sequence[Mixer]) -> Iterator[None]:
    """While open, each mixer's call traces as one ``moeopt::Recurrence`` node."""
    from transformers import Cache

    def stand_in(number: int, mixer: Mixer) -> Callable[..., Any]:
        def forward(*args: PyObject, **kwargs: PyObject) -> PyObject:
            leaves, form = pytree.tree_flatten((args, kwargs), is_leaf=lambda value: isinstance(value, Cache))
            tokens = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            if form != mixer.form or tokens != mixer.tokens:
                raise Declined(f"{mixer.name} is called with other arguments while it is traced")
            layer = leaves[mixer.cache].layers[mixer.layer]
            places = [state.rpartition(".") for state in mixer.states]
            states = [getattr(layer, kind)[int(at)] for kind, _, at in places]
            rows = (states[0].shape[0], leaves[tokens[0]].shape[1])
            ends = [end for end in mixer.ends if isinstance(end, Tensor)]
            made = torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{OP}",
                [*(leaves[n].expand(rows[0], *leaves[n].shape[1:]) for n in tokens), *states],
                {"mixer": number},
                dtypes=[t.dtype for t in (*ends, *states)],
                shapes=[*([*rows, *end.shape[2:]] for end in ends), *(state.shape for state in states)],
                version=1,
            )
            for (kind, _, at), state in zip(places, made[len(ends) :], strict=True):
                getattr(layer, kind)[int(at)] = state
            return mixer.results(made[: len(ends)])

        return forward

    before = [vars(mixer.module).get("forward") for mixer in mixers]
    for number, mixer in enumerate(mixers):
        vars(mixer.module)["forward"] = stand_in(number, mixer)
    try:
        yield
    finally:
        for mixer, own in zip(mixers, before, strict=True):
            if own is None:
                del vars(mixer.module)["forward"]
            else:
                vars(mixer.module)["forward"] = own

"""Which modules of a model are layers of one kind: the same code over other weights, so that one trace serves all.

A candidate is a module of more than two weights that has a sibling of its class. ``capture.alike`` compares two of
them part by part. Three things that differ between layers do not make them unlike here:

    a rewritten forward    where both run the same block graph under the same guard, each on its own weights
    a buffer's values      (the router's bias of DeepSeek-V3), which a trace sees no more of than of a parameter's
    a plain attribute      (``layer_idx``) which the traced layer did not read: ``stamps`` looks at what it reads
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from torch import nn

from moeopt.capture.alike import equal_values, unequal_plain, unlike
from moeopt.lower.plain_attributes import AttributePlace, held_at
from moeopt.rewrite.graph_words import graph_to_words
from moeopt.rewrite.install import RewrittenForward
from moeopt.value_types import PyObject


def repeated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost candidates by path."""
    found: dict[str, nn.Module] = {}
    todo = [("", model)]
    while todo:
        path, module = todo.pop(0)
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        classes = Counter(type(child) for _, child in children)
        for at, child in children:
            if classes[type(child)] > 1 and _is_layer(child):
                found[at] = child
            else:
                todo.append((at, child))
    return found


def _is_layer(module: nn.Module) -> bool:
    """Whether a module computes something itself, on more weights than a Linear or a norm has."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return not isinstance(module, containers) and len(list(itertools.islice(weights_by_name(module), 3))) > 2


def differences(a: nn.Module, b: nn.Module) -> frozenset[tuple[str, str]] | None:
    """The plain attributes in which two layers differ, as (path of the module, name); None where more differs."""
    if type(a) is not type(b):
        return None
    plain = unequal_plain(a, b)

    def ignored(path: str, module: nn.Module, name: str) -> bool:
        return (path, name) in plain or (name == "forward" and isinstance(module.__dict__[name], RewrittenForward))

    if unlike(a, b, ignored, buffers=False):
        return None
    pairs = itertools.zip_longest(a.modules(), b.modules())
    return plain if all(_same_forward(one, other) for one, other in pairs) else None


def _same_forward(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.__dict__.get("forward"), b.__dict__.get("forward")
    if not isinstance(one, RewrittenForward) or not isinstance(other, RewrittenForward):
        return one is other
    return one is other or _program(one) == _program(other) and _frozen(one, other)


def _program(forward: RewrittenForward) -> tuple[Any, ...]:
    """What a rewritten forward computes, as values that can be compared."""
    block = forward.program.block
    words = [word[:-1] for word in graph_to_words(block.graph)]  # without the nodes' notes
    fields = (
        block.weights, block.routers, block.output, block.mutations, block.attributes, block.per_token, block.formats,
    )  # fmt: skip
    return words, fields, forward.program.guard


def _frozen(a: RewrittenForward, b: RewrittenForward) -> bool:
    """Whether the constants of two forwards are the same, bit by bit."""
    one, other = a.program.block, b.program.block
    if one.codes or other.codes:  # of each layer's own weights
        return False
    return equal_values((one.constants, one.frozen), (other.constants, other.frozen))


def weights_by_name(module: nn.Module) -> dict[str, Any]:
    """The parameters and buffers of a layer, one that stands at two places under both names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


class Likeness:
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

    def are_numbers(self, path: str, at: AttributePlace) -> bool:
        """Whether an attribute is an int in each layer of the group of ``path``."""
        group = [p for p, first in self._group.items() if first == self._group[path]]
        return all(type(held_at(self._candidates[p], at)) is int for p in group)

    def __call__(self, traced: str, path: str, read: set[tuple[str, str]]) -> bool:
        """Whether a layer is like a traced one in all that the traced one has ``read``."""
        if self._group[traced] != self._group[path]:
            return False
        one, other = self._candidates[traced], self._candidates[path]
        return all(repr(_kept(one, at)) == repr(_kept(other, at)) for at in read)


def _kept(layer: nn.Module, at: AttributePlace) -> PyObject:
    value = held_at(layer, at)
    return type(value), value

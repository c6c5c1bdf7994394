"""An example call in other sizes, for an engine to be compared in; and which sizes are left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.bundle.holds import sentences
from moeopt.bundle.shape_guards import holds, value_of
from moeopt.capture.tree import ArgsKwargs
from moeopt.value_types import PyObject


def other_sizes(signature: Mapping[str, Any], call: ArgsKwargs) -> list[ArgsKwargs]:
    """The call with every free size made larger, and made the least, its values repeated or cut off.

    Where the engine holds for neither, one size is changed by as little as it can be.
    """
    return sizes_to_try(signature, call)[0]


def sizes_to_try(signature: Mapping[str, Any], call: ArgsKwargs) -> tuple[list[ArgsKwargs], list[str]]:
    """The calls of :func:`other_sizes`, and a line for the sizes that the engine does not hold for."""
    leaves, spec = pytree.tree_flatten((tuple(call[0]), dict(call[1])))
    entries, conditions = signature["inputs"], signature.get("conditions", [])
    if len(leaves) != len(entries):
        return [], ["the structure of the call is not known here"]
    have: dict[str, int] = {}
    for leaf, entry in zip(leaves, entries, strict=True):
        have |= {
            d: n for d, n in zip(entry.get("shape", []), getattr(leaf, "shape", ()), strict=False) if type(d) is str
        }
    calls: list[ArgsKwargs] = []
    left_out: list[str] = []

    def add(sizes: dict[str, int]) -> bool:
        """Whether the engine holds for these sizes, which may be those of the call."""
        made = _made(leaves, entries, conditions, sizes | _products(sizes, have, entries))
        shapes = [tuple(t.shape) for t in made if isinstance(t, torch.Tensor)]
        if shapes == [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)]:
            return True
        if not holds(conditions, lambda n: made[n].shape):
            left_out.append(", ".join(map(str, shapes)))
            return False
        calls.append(pytree.tree_unflatten(made, spec))
        return True

    def within(change: Callable[[int], int]) -> dict[str, int]:
        return {dim: _within(change(n), signature["sizes"].get(dim, [0, None])) for dim, n in have.items()}

    add(within(lambda n: 2 * n + 1))
    add(within(lambda n: 1))
    if left_out and not calls:
        refused = list(left_out)
        for sizes in _near(have):
            add({dim: _within(n, signature["sizes"].get(dim, [0, None])) for dim, n in sizes.items()})
            if calls:
                break
        left_out = refused
    if not left_out:
        return calls, []
    return calls, [f"{' and '.join(left_out)}: the engine holds only where {' and '.join(sentences(signature))}"]


def _near(have: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes of which one is a little larger or smaller than in the call."""
    for step in (1, -1, 2, -2, 3, -3):
        for dim, size in have.items():
            if size + step > 0:
                yield {**have, dim: size + step}


def _products(sizes: Mapping[str, int], have: Mapping[str, int], entries: PyObject) -> dict[str, int]:
    """Sizes that were the product of two others, of an input that lacks them (an id for each token of rows of tokens):
    a model that reads them so does not say so where it only indexes with them."""
    found: dict[str, int] = {}
    for entry in entries:
        free = [dim for dim in entry.get("shape", []) if isinstance(dim, str) and have[dim] > 1]
        for at, first in enumerate(free):
            for second in free[at + 1 :]:
                product = have[first] * have[second]
                found |= {d: sizes[first] * sizes[second] for d, n in have.items() if n == product and d not in free}
    return found


def _made(leaves: list[Any], entries: PyObject, conditions: PyObject, sizes: Mapping[str, int]) -> list[Any]:
    """The leaves in these sizes; a size that is computed from others is what its condition says."""
    made = [_resized(leaf, entry.get("shape", []), sizes) for leaf, entry in zip(leaves, entries, strict=True)]
    for number, entry in enumerate(entries):
        for dim, size in enumerate(entry.get("shape", [])):
            if size is None:
                computed = next((c[2] for c in conditions if c[:2] == ["==", ["size", number, dim]]), None)
                if computed is not None:
                    wanted = value_of(computed, lambda n: made[n].shape)
                    made[number] = _repeated(made[number], dim, int(wanted))
    return made


def _resized(leaf: PyObject, shape: list[Any], sizes: Mapping[str, int]) -> PyObject:
    for axis, dim in enumerate(shape):
        if isinstance(dim, str):
            leaf = _repeated(leaf, axis, sizes[dim])
    return leaf


def _repeated(leaf: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """With ``size`` along an axis, its values repeated or cut off."""
    if not leaf.shape[axis] or leaf.shape[axis] == size:
        return leaf
    return leaf.index_select(axis, torch.arange(size, device=leaf.device) % leaf.shape[axis])


def _within(size: int, bounds: list[Any]) -> int:
    low, high = bounds
    return int(max(low, size if high is None else min(size, high)))

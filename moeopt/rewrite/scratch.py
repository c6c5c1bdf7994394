"""Attributes that a forward writes before it reads them: notes to itself within one call, and no state.

Rewritten code does not repeat the Python that made such a value (``self.sizes = counts.tolist()``); it takes the
attribute away, so that whoever reads it from outside gets an ``AttributeError`` and no value of another call.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterator

import torch
from torch import fx, nn

from moeopt.capture.isolated_run import run_quietly, undone
from moeopt.capture.same_graph import same_computation
from moeopt.capture.tape import Tape, clone_inputs, record
from moeopt.capture.tree import ArgsKwargs, tree_leaves
from moeopt.errors import CaptureError
from moeopt.value_types import PyObject

AttributeKey = tuple[str, str]


class Unset(enum.Enum):
    """In the place of a stored value: the attribute is taken away."""

    UNSET = "unset"


UNSET = Unset.UNSET


def storable(value: PyObject) -> bool:
    """True for what rewritten code can store as the original did: tensors and dtypes, in any containers."""
    leaves = list(tree_leaves(value))
    return bool(leaves) and all(isinstance(v, (fx.Node, torch.dtype)) for v in leaves)


def scratch_attributes(module: nn.Module, call: ArgsKwargs, tape: Tape, other: ArgsKwargs) -> frozenset[AttributeKey]:
    """(module path, attribute) of each Python value that the forward stores and that no later call reads.

    With the attribute absent, and with what the call ``other`` stored in it, the module must compute the same, line by
    line, as ``tape`` says of ``call``, and store the same. ``other`` has other tokens, as many.
    """
    stored = {k for k, v in tape.attributes.items() if k not in tape.in_place and not storable(v)}
    if not stored or _same_without(module, call, tape, other, stored):
        return frozenset(stored)
    return frozenset(key for key in stored if _same_without(module, call, tape, other, {key}))


def _same_without(
    module: nn.Module, call: ArgsKwargs, tape: Tape, other: ArgsKwargs, keys: Collection[AttributeKey]
) -> bool:
    try:
        with _without(module, keys):
            alone = record(module, *call, keep_values=False)
            with undone(module) as watched:
                with watched:
                    args, kwargs = clone_inputs(other)
                    module(*args, **kwargs)
                stored = {(path, name): module.get_submodule(path).__dict__.get(name) for path, name in keys}
                later = record(module, *call, keep_values=False)
            same = all(same_computation(tape, one, keys) for one in (alone, later))
            return same and all(_alike(alone.attributes.get(k), later.attributes.get(k, stored[k])) for k in keys)
    except Exception:  # it reads what is not there
        return False


def _alike(a: PyObject, b: PyObject) -> bool:
    """The same Python values: a counter stores another one at each call."""
    leaves = [[repr(v) for v in tree_leaves(t) if not isinstance(v, (fx.Node, torch.Tensor))] for t in (a, b)]
    return leaves[0] == leaves[1]


@contextlib.contextmanager
def _without(module: nn.Module, keys: Collection[AttributeKey]) -> Iterator[None]:
    held = {}
    for path, name in keys:
        attributes = module.get_submodule(path).__dict__
        if name in attributes:
            held[path, name] = attributes.pop(name)
    try:
        yield
    finally:
        for (path, name), value in held.items():
            module.get_submodule(path).__dict__[name] = value


def read_outside(model: nn.Module, call: ArgsKwargs, path: str, keys: Collection[AttributeKey]) -> bool:
    """Whether the rest of ``model`` reads attributes that the module at ``path`` has stored."""
    module = model.get_submodule(path)

    def forget(*args: PyObject) -> None:
        for inner, name in keys:
            module.get_submodule(inner).__dict__.pop(name, None)

    want = run_quietly(model, *call)
    handle = module.register_forward_hook(forget)
    try:
        got = run_quietly(model, *call)
    except CaptureError:
        return True
    finally:
        handle.remove()
    pairs = zip(tree_leaves(want), tree_leaves(got), strict=True)
    return not all(_equal(a, b) for a, b in pairs)


def _equal(a: PyObject, b: PyObject) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b)

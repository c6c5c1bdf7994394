"""What a run *chose*: the integer and boolean results of ops that read floating values, in order.

Routing is discontinuous: an ulp in a logit swaps whole experts. Everything else in a block is smooth.
So a run is recorded as its choices (top-k, argmax, sort, comparisons, casts to integers ...), and
another run of the same code in another precision is made to choose alike.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from moeopt.errors import Declined
from moeopt.value_types import PyObject


class OracleError(Declined):
    """The float64 oracle cannot run a block, or its run parted ways with the recorded one."""


_GATHERED = "topk sort max min kthvalue mode median nanmedian cummax cummin"
_REDUCED = {"aten::argmax", "aten::argmin", "aten::argsort", "moeopt::route"}

GATHERED = frozenset(f"aten::{name}" for name in _GATHERED.split())
"""Ops that return (values, indices) along a dim."""

_POOLS = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
WINDOWED = frozenset(f"aten::{name}" for name in _POOLS)
"""Ops whose values are the largest of windows: their places are no choice, and PyTorch gives them or not by dtype and
gradients."""

ROUTING = GATHERED - {"aten::cummax", "aten::cummin"} | _REDUCED
"""Ops whose integers may be expert ids."""


@dataclass
class Event:
    """One choice: ``op`` read ``shapes`` and gave ``outputs`` (None where an output is floating).

    ``scores`` is what a ROUTING op compared, with the compared dim last; None for other ops.
    """

    op: OpOverload
    shapes: tuple[tuple[int, ...], ...]
    outputs: tuple[Any, ...]
    scores: Tensor | None = None
    dim: int = -1

    @property
    def is_routing(self) -> bool:
        return self.op._schema.name in ROUTING

    @property
    def ids(self) -> Tensor:
        """The integers chosen, (..., K): the compared dim last, a reduced one kept as K = 1."""
        ids = next(o for o in self.outputs if isinstance(o, Tensor))
        if self.scores is None or self.op._schema.name == "moeopt::route":
            return ids
        if ids.dim() < self.scores.dim():
            return ids.unsqueeze(-1)
        return ids.movedim(self.dim, -1)

    def with_ids(self, ids: Tensor) -> Event:
        """The same event with other integers, given as :attr:`ids` gives them."""
        old = next(o for o in self.outputs if isinstance(o, Tensor))
        if self.scores is not None and old.dim() < self.scores.dim():
            ids = ids.squeeze(-1)
        elif self.scores is not None and self.op._schema.name != "moeopt::route":
            ids = ids.movedim(-1, self.dim)
        return dataclasses.replace(self, outputs=tuple(ids if o is old else o for o in self.outputs))


@dataclass
class Selections:
    """The choices of one run, and what it wrote besides its outputs.

    ``state``: name -> value after, of parameters and buffers; ``changed``: those of other values than before;
    ``inputs``: number of the flattened argument -> value after; ``epsilons``: of each ``rms_norm`` without one, in
    order, what its dtype made of it.
    """

    events: list[Event] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    inputs: dict[int, Tensor] = field(default_factory=dict)
    epsilons: list[float] = field(default_factory=list)

    def routing(self) -> list[Event]:
        return [event for event in self.events if event.is_routing]

    def replaced(self, old: Event, new: Event) -> Selections:
        """The same selections with one event exchanged."""
        return dataclasses.replace(self, events=[new if event is old else event for event in self.events])


def floats_and_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, tuple[tuple[int, ...], ...]]:
    """Whether any tensor argument is floating, and the shapes of all tensor arguments in order."""
    floating, shapes = False, []
    stack = [*args, *kwargs.values()]
    for arg in stack:
        if isinstance(arg, Tensor):
            floating |= arg.dtype.is_floating_point
            shapes.append(tuple(arg.shape))
        elif isinstance(arg, list | tuple):
            for item in arg:
                if isinstance(item, Tensor):
                    floating |= item.dtype.is_floating_point
                    shapes.append(tuple(item.shape))
    return floating, tuple(shapes)


def chosen(out: PyObject) -> bool:
    """Whether an op's result holds integers, booleans or a Python bool."""
    if isinstance(out, Tensor):
        return not (out.dtype.is_floating_point or out.dtype.is_complex)
    if isinstance(out, list | tuple):
        return any(chosen(item) for item in out)
    return isinstance(out, bool)


def argument(func: OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
    """The value of argument ``name`` of a call, default included."""
    for position, arg in enumerate(func._schema.arguments):
        if arg.name == name:
            if position < len(args) and not arg.kwarg_only:
                return args[position]
            return kwargs.get(name, arg.default_value)
    return None


def make_event(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: PyObject) -> Event | None:
    """The event of one call, or None when nothing floating was read, or only windows were looked through."""
    floating, shapes = floats_and_shapes(args, kwargs)
    name = func._schema.name
    if not floating or name in WINDOWED:
        return None
    outs = out if isinstance(out, list | tuple) else (out,)
    kept = tuple(None if not chosen(o) else o.clone() if isinstance(o, Tensor) else o for o in outs)
    if name not in ROUTING or not args or not isinstance(args[0], Tensor):
        return Event(func, shapes, kept)
    dim = argument(func, "dim", args, kwargs)
    if dim is None:  # over all elements
        return Event(func, shapes, kept, args[0].detach().reshape(1, -1).clone(), 0)
    scores = args[0].detach()
    return Event(func, shapes, kept, (scores.movedim(dim, -1) if scores.dim() else scores.reshape(1)).clone(), dim)


def regather(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], pinned: tuple[Any, ...]) -> Any | None:
    """(values, indices) of a GATHERED op with the indices given; None when ``func`` is not one."""
    if func._schema.name not in GATHERED or len(pinned) != 2 or pinned[0] is not None:
        return None
    x, ids = args[0], pinned[1].clone()
    dim = argument(func, "dim", args, kwargs)
    if dim is None or not x.dim():
        return None
    if ids.dim() < x.dim():
        return x.gather(dim, ids.unsqueeze(dim)).squeeze(dim), ids
    return x.gather(dim, ids), ids


def fresh(value: PyObject) -> PyObject:
    """A copy that the caller's code may write to."""
    return value.clone() if isinstance(value, Tensor) else value

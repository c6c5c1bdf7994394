"""From the plans of several probe calls to one plan for every shape.

The same block, run on inputs of different sizes, gives the same steps with different integers. An integer that never
changes is a constant; one that changes must be a size of an input, a product of sizes, a multiple or an offset of one.
Anything else that changes (a float, a tensor made outside PyTorch, the steps themselves) means that the forward depends
on the data in a way that no graph repeats, and the block is declined.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from moeopt.capture.tree import tree_leaves
from moeopt.errors import Declined
from moeopt.rewrite.call_guard import Tie
from moeopt.rewrite.kept_steps import ChangesOutside, KeptStep, KeptSteps, StepRef
from moeopt.rewrite.view_or_copy import without_copies_of_some
from moeopt.value_types import PyObject


@dataclass(frozen=True)
class Size:
    """``factor * product of sizes // divisor + offset``; each size is (input number, dimension)."""

    dims: tuple[tuple[int, int], ...]
    factor: int = 1
    divisor: int = 1
    offset: int = 0

    def __str__(self) -> str:
        text = "*".join(f"input_{i}.shape[{d}]" for i, d in self.dims)
        text = text if self.factor == 1 else f"{self.factor}*{text}"
        text = text if self.divisor == 1 else f"{text}//{self.divisor}"
        return text if not self.offset else f"{text}{self.offset:+d}"


@dataclass(frozen=True)
class Ratio:
    """A float that is ``factor`` times or over a product of sizes (a mean written by hand)."""

    dims: tuple[tuple[int, int], ...]
    factor: float
    inverse: bool


@dataclass(frozen=True)
class DeviceOf:
    """The device of the first input, wherever the probe call named its own device."""


class InputSizes:
    """Input sizes that differ between the probe calls, and how to write an integer in terms of them."""

    def __init__(self, shapes: list[list[tuple[int, ...]]]) -> None:
        """``shapes[w][i]`` is the shape of tensor input i in probe call w."""
        seen: dict[tuple[int, ...], tuple[int, int]] = {}
        for i, per_witness in enumerate(zip(*shapes, strict=True)):
            for d, sizes in enumerate(zip(*per_witness, strict=True)):
                if len(set(sizes)) > 1:
                    seen.setdefault(sizes, (i, d))
        self.count = len(shapes)
        self._products = [
            (tuple(seen[v] for v in chosen), tuple(math.prod(c) for c in zip(*chosen, strict=True)))
            for n in (1, 2, 3)
            for chosen in itertools.combinations(seen, n)
        ]

    def express(self, values: tuple[int, ...]) -> Size | None:
        """``values``, one per probe call, as a :class:`Size`; None when no simple expression fits."""
        for dims, sizes in self._products:
            if all(v % s == 0 for v, s in zip(values, sizes, strict=True)):
                factors = {v // s for v, s in zip(values, sizes, strict=True)}
                if len(factors) == 1:
                    return Size(dims, factor=factors.pop())
        for dims, sizes in self._products:
            offsets = {v - s for v, s in zip(values, sizes, strict=True)}
            if len(offsets) == 1:
                return Size(dims, offset=offsets.pop())
            if all(v and s % v == 0 for v, s in zip(values, sizes, strict=True)):
                divisors = {s // v for v, s in zip(values, sizes, strict=True)}
                if len(divisors) == 1:
                    return Size(dims, divisor=divisors.pop())
        return None

    def ratio(self, values: tuple[float, ...]) -> Ratio | None:
        """``values`` as a :class:`Ratio` that gives them back bit for bit; None when none does."""
        for dims, sizes in self._products if all(map(math.isfinite, values)) else ():
            for inverse in (True, False):
                factor = values[0] * sizes[0] if inverse else values[0] / sizes[0]
                factor = float(round(factor)) if abs(factor - round(factor)) < 1e-9 else factor
                again = tuple(factor / s if inverse else factor * s for s in sizes)
                if again == values:
                    return Ratio(dims, factor, inverse)
        return None


def tied_sizes(shapes: list[list[tuple[int, ...]]]) -> tuple[Tie, ...]:
    """Sizes of inputs that varied, and were in each probe call the same as another one or a product of others.

    Args:
        shapes: ``shapes[w][i]`` is the shape of tensor input i in probe call w.
    """
    first: dict[tuple[int, ...], tuple[int, int]] = {}
    ties: list[Tie] = []
    for i, per_witness in enumerate(zip(*shapes, strict=True)):
        for d, sizes in enumerate(zip(*per_witness, strict=True)):
            if len(set(sizes)) > 1 and first.setdefault(sizes, (i, d)) != (i, d):
                ties.append(((i, d), (first[sizes],)))
    for n in (2, 3):
        for chosen in itertools.combinations(first, n):
            product = tuple(math.prod(c) for c in zip(*chosen, strict=True))
            if product in first and product not in chosen:
                ties.append((first[product], tuple(first[sizes] for sizes in chosen)))
    return tuple(ties)


def generalize(plans: list[KeptSteps], shapes: list[list[tuple[int, ...]]]) -> KeptSteps:
    """One plan whose integers hold for every shape.

    Raises:
        Declined: the plans differ in something other than sizes; ``ChangesOutside`` where it is their steps.
    """
    sizes, plans = InputSizes(shapes), without_copies_of_some(plans)
    first = plans[0]
    _refuse_padding(plans, sizes)
    _refuse_shares(plans, sizes)
    for other in plans[1:]:
        if step_names(other) != step_names(first):
            raise ChangesOutside(
                "what its forward computes outside the experts changes with the data or with the number of tokens "
                f"({_difference(first, other)})",
                _where(first, other),
            )
    steps = []
    for versions in zip(*(p.steps for p in plans), strict=True):
        step = versions[0]
        where = step.source or None
        if step.kind == "constant":
            if not all(torch.equal(v.target, step.target) for v in versions):
                raise Declined(
                    "a tensor that its forward makes outside PyTorch (from a list, NumPy or .data) changes with the "
                    "input; compute it with torch operations, and of tables that are looked up by a size (in a dict, a "
                    "cache) hold one as a buffer, and take its first rows",
                    where,
                )
            steps.append(dataclasses.replace(step))
            continue
        args = _merge(_open_views([v.args for v in versions], step, sizes), sizes, where)
        kwargs = _merge([v.kwargs for v in versions], sizes, where)
        shape = _shape([v.shape for v in versions], sizes)
        steps.append(KeptStep(step.kind, step.target, args, kwargs, step.source, shape, step.dtype))
    return KeptSteps(
        steps,
        _merge([p.output for p in plans], sizes, None),
        _merge([p.mutations for p in plans], sizes, None),
        _merge([p.attributes for p in plans], sizes, None),
        first.kept_modules,
    )


def _open_views(versions: list[Any], step: KeptStep, sizes: InputSizes) -> list[Any]:
    """The arguments of a view with -1 for its one size that is no function of the inputs': the number of elements says
    what it is (rows that ``nonzero`` gave, flattened)."""
    if _name(step).removeprefix("aten.") not in ("view.default", "_unsafe_view.default", "reshape.default"):
        return versions
    asked = [v[1] for v in versions]
    if len({len(a) for a in asked}) > 1 or any(type(n) is not int for a in asked for n in a):
        return versions
    each = list(zip(*asked, strict=True))
    loose = [i for i, ns in enumerate(each) if len(set(ns)) > 1 and sizes.express(ns) is None]
    if len(loose) != 1 or any(0 in ns for i, ns in enumerate(each) if i != loose[0]):
        return versions
    return [(v[0], [-1 if i == loose[0] else n for i, n in enumerate(v[1])], *v[2:]) for v in versions]


def _shape(versions: list[tuple[int, ...] | None], sizes: InputSizes) -> tuple[int | Size | None, ...] | None:
    """One shape for all; None for a size that is no simple function of the inputs', or where the rank differs."""
    first = versions[0]
    if first is None or any(v is None or len(v) != len(first) for v in versions):
        return None
    each = zip(*versions, strict=True)
    return tuple(v[0] if len(set(v)) == 1 else sizes.express(v) for v in each)


def step_names(plan: KeptSteps) -> list[tuple[str, str]]:
    """What each step of a plan is and calls; sizes and numbers are no part of it."""
    return [(s.kind, _name(s)) for s in plan.steps]


def _name(step: KeptStep) -> str:
    return "" if step.kind == "constant" else str(step.target)


def _difference(a: KeptSteps, b: KeptSteps) -> str:
    for x, y in itertools.zip_longest(a.steps, b.steps):
        if x is None or y is None or (x.kind, _name(x)) != (y.kind, _name(y)):
            return f"{_name(x) if x else 'nothing'} against {_name(y) if y else 'nothing'}"
    return "the same steps"


def _refuse_padding(plans: list[KeptSteps], sizes: InputSizes) -> None:
    """Padding by amounts that are no simple function of the sizes: up to a multiple."""
    for versions in zip(*([s for s in p.steps if "constant_pad" in _name(s)] for p in plans), strict=False):
        for amounts in zip(*(tree_leaves(v.args[1]) for v in versions), strict=False):
            if len(set(amounts)) > 1 and all(type(a) is int for a in amounts) and sizes.express(amounts) is None:
                raise Declined(
                    f"its forward pads rows by {' or '.join(map(str, amounts))}, which is no simple function of the "
                    "input's shape (up to a multiple, as some kernels ask for?), so that no one graph holds for all "
                    "numbers of tokens; the op takes any number of rows: leave the padding out",
                    versions[0].source or None,
                )


def _refuse_shares(plans: list[KeptSteps], sizes: InputSizes) -> None:
    """A top-k of as many tokens as a number that is rounded says."""
    for versions in zip(*([s for s in p.steps if "aten.topk" in _name(s)] for p in plans), strict=False):
        counts = [v.args[1] for v in versions]
        if len(set(counts)) > 1 and all(type(a) is int for a in counts) and sizes.express(tuple(counts)) is None:
            raise Declined(
                f"its forward keeps the best {' or '.join(map(str, counts))} of its tokens (topk), a number that is "
                "rounded from how many there are, as in expert choice, so that no one graph holds for all numbers of "
                "tokens; keep a fixed number of them, or let each token choose its experts",
                versions[0].source or None,
            )


def _where(a: KeptSteps, b: KeptSteps) -> str | None:
    for x, y in itertools.zip_longest(a.steps, b.steps):
        if x is None or y is None or (x.kind, _name(x)) != (y.kind, _name(y)):
            return (x or y).source or None
    return None


def _merge(versions: list[Any], sizes: InputSizes, where: str | None) -> PyObject:
    first = versions[0]
    if isinstance(first, StepRef):
        if any(v != first for v in versions):
            raise Declined("its forward wires its steps differently for different inputs", where)
        return first
    if any(type(v) is not type(first) for v in versions):
        raise Declined(f"its forward passes {first!r} for one input and {versions[-1]!r} for another", where)
    if isinstance(first, bool) or first is None:
        return _same(versions, where)
    if isinstance(first, int):
        return _merge_integers(versions, sizes, where)
    if isinstance(first, float) and any(v != first for v in versions):
        ratio = sizes.ratio(tuple(versions))
        if ratio is not None:
            return ratio
    if isinstance(first, torch.device):
        return DeviceOf() if first.type == "cpu" or first.type == "cuda" else first
    if type(first) in (list, tuple, dict) or type(first).__name__ in ("immutable_dict", "immutable_list"):
        return _merge_containers(versions, sizes, where)
    if isinstance(first, (str, float, torch.dtype, torch.layout, torch.memory_format)):
        return _same(versions, where)
    if any([repr(x) for x in tree_leaves(v)] != [repr(x) for x in tree_leaves(first)] for v in versions):
        raise Declined(f"a {type(first).__name__} in its forward changes with the input", where)
    return first


def _merge_integers(versions: list[int], sizes: InputSizes, where: str | None) -> int | Size:
    if all(v == versions[0] for v in versions):
        return versions[0]
    size = sizes.express(tuple(versions))
    if size is None:
        raise Declined(
            f"the integer {' or '.join(str(v) for v in versions)} in its forward changes with the input and is "
            "no simple function of the input's shape (was it read from a tensor with .item(), or rounded, as a "
            "capacity of n // 2?); a capacity need not be rounded: compare each position with the product itself "
            "(position < tokens * 1.25 / experts), which keeps the same tokens as a capacity that is rounded up",
            where,
        )
    return size


def _merge_containers(versions: list[Any], sizes: InputSizes, where: str | None) -> PyObject:
    first = versions[0]
    if isinstance(first, dict):
        if any(v.keys() != first.keys() for v in versions):
            raise Declined("the keys of a dict in its forward change with the input", where)
        return {k: _merge([v[k] for v in versions], sizes, where) for k in first}
    if len({len(v) for v in versions}) > 1:
        raise Declined("the number of tensors in its forward changes with the input", where)
    return (tuple if type(first) is tuple else list)(_merge(list(v), sizes, where) for v in zip(*versions, strict=True))


def _same(versions: list[Any], where: str | None) -> PyObject:
    if any(v != versions[0] and not (v != v and versions[0] != versions[0]) for v in versions):
        raise Declined(
            f"the value {versions[0]!r} in its forward changes with the input (read from a tensor, or made of a size, "
            "as by math.sqrt(n)?); keep it in a tensor",
            where,
        )
    return versions[0]

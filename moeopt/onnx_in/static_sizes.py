"""A region of a file that was exported for one size, with the sizes of its rows free.

Such a file runs on that size only, and shapes are numbers in it. To be read, a region must run on other numbers of
rows. Constants that are the size of the root's rows (or their product) become sizes where an operator takes a shape;
fills and counts that an exporter folded become what they were folded of. A number that only happens to be equal may so
become a size: that is no danger. On the file's own size the region computes what it did, which is checked against ONNX
Runtime, and on others nobody can run the file. Two such numbers are told from sizes, as they stop the region on other
numbers of rows: an end of a ``Slice`` that is not the end of what is cut, and the length of a shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeopt.onnx_in.free_names import FreeNames
from moeopt.onnx_in.program import NodeStep, SizeTerm

_SHAPES = {("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Tile", 1), ("Slice", 2), ("Range", 1)}
"""Which input of an operator is a shape, an end or a count."""

_SHAPE_OF = dict(_SHAPES)
_OF_EACH = frozenset(("Mul", "Where", "Equal", "Add", "Sub", "Div", "Cast", "Identity", "Max", "Min"))
"""Operators by which exporters make one shape of others, number by number."""

FreeSizes = dict[str, tuple[SizeTerm, ...] | SizeTerm]


def free_sizes(
    steps: Sequence[NodeStep], constants: Mapping[str, Tensor], root: Sequence[int], feature: int,
    shapes: Mapping[str, Sequence[int]],
) -> tuple[list[NodeStep], FreeSizes]:  # fmt: skip
    """The steps with free sizes, and the sizes by name.

    Args:
        root: the shape of the region's first input. feature: its axis that is no row.
        shapes: of the values on the file's own size, by name, as far as they are known.
    """
    terms = _terms(root, feature % len(root))
    made: list[NodeStep] = []
    sizes: FreeSizes = {}
    taken = {name for step in steps for name in (*step.inputs, *step.outputs)}
    names = FreeNames(taken | constants.keys())
    filled: dict[str, str] = {}
    ranks = _lengths_of_shapes(steps)
    for step in steps:
        inputs = list(step.inputs)
        for number, name in enumerate(inputs):
            if name not in constants:
                continue
            value = constants[name]
            if (step.op_type, number) in _SHAPES and value.dtype == torch.int64 and value.dim() <= 1:
                if step.outputs[0] not in ranks and not _cuts_short(step, constants, shapes):
                    inputs[number] = _as_size(name, value, terms, sizes, names)
            elif value.numel() > 1 and any(n in terms for n in value.shape):
                if name not in filled:
                    filled[name] = _unfolded(name, value, terms, sizes, made, names)
                inputs[number] = filled[name]
        made.append(replace(step, inputs=tuple(inputs)))
    return made, sizes


def _lengths_of_shapes(steps: Sequence[NodeStep]) -> set[str]:
    """Values that are computed into the shape that an operator takes: how long one is, is a rank."""
    found: set[str] = set()
    for step in reversed(steps):
        if not found.isdisjoint(step.outputs) and step.op_type in _OF_EACH:
            found |= set(step.inputs)
        elif step.op_type in ("Expand", "Reshape", "Tile", "ConstantOfShape"):
            found.add(step.inputs[_SHAPE_OF[step.op_type]])
    return found


def _cuts_short(step: NodeStep, constants: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a ``Slice`` ends before what it cuts does."""
    shape = shapes.get(step.inputs[0]) if step.op_type == "Slice" else None
    axes = constants.get(step.inputs[3]) if len(step.inputs) > 3 else None
    if shape is None or (axes is None and len(step.inputs) > 3):
        return False
    ends = constants[step.inputs[2]].reshape(-1).tolist()
    cut = range(len(ends)) if axes is None else axes.reshape(-1).tolist()
    return any(end < shape[axis] for end, axis in zip(ends, cut, strict=True))


def _terms(root: Sequence[int], feature: int) -> dict[int, SizeTerm]:
    """FreeSizes of the root's rows and products of these, by their values; 1 says nothing."""
    free = [d for d in range(len(root)) if d != feature]
    found: dict[int, SizeTerm] = {}
    for count in range(1, len(free) + 1):
        for chosen in itertools.combinations(free, count):
            number = math.prod(root[d] for d in chosen)
            if number > 1:
                found.setdefault(number, SizeTerm(1, tuple((0, d) for d in chosen)))
    return found


def _as_size(
    name: str, value: Tensor, terms: Mapping[int, SizeTerm], sizes: FreeSizes, names: FreeNames
) -> str:  # fmt: skip
    """The name of a constant shape with the sizes in it; its own where there is none."""
    numbers = value.reshape(-1).tolist()
    if not any(n in terms for n in numbers):
        return name
    made = [terms.get(n, SizeTerm(n)) for n in numbers]
    fresh = names.new(f"{name}.size")
    sizes[fresh] = tuple(made) if value.dim() else made[0]
    return fresh


def _unfolded(
    name: str, value: Tensor, terms: Mapping[int, SizeTerm], sizes: FreeSizes, steps: list[NodeStep], names: FreeNames
) -> str:  # fmt: skip
    """The name of a fill or a count as it was before it was folded; the constant's own for any other."""
    flat = value.reshape(-1)
    shape = tuple(terms.get(n, SizeTerm(n)) for n in value.shape)
    if bool((flat == flat[0]).all()):
        fill, of_shape = names.new(f"{name}.fill"), names.new(f"{name}.shape")
        sizes[of_shape] = shape
        attributes = {"value": flat[:1].clone()}
        steps.append(NodeStep("", "ConstantOfShape", fill, (of_shape,), (fill,), attributes))
        return fill
    if value.dim() == 1 and value.dtype == torch.int64 and torch.equal(value, torch.arange(len(value))):
        made, *reads = (names.new(f"{name}.{part}") for part in ("range", "zero", "count", "one"))
        sizes |= dict(zip(reads, (SizeTerm(0), shape[0], SizeTerm(1)), strict=True))
        steps.append(NodeStep("", "Range", made, tuple(reads), (made,)))
        return made
    return name

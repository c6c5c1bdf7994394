"""A region of a file that was exported for one size, with the sizes of its rows free.

Such a file runs on that size only, and shapes are numbers in it. To be read, a region must run on other numbers of
rows. Constants that are the size of the root's rows (or their product) become sizes where an operator takes a shape;
fills and counts that an exporter folded become what they were folded of. A number that only happens to be equal may so
become a size: that is no danger. On the file's own size the region computes what it did, which is checked against ONNX
Runtime, and on others nobody can run the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeopt.onnx_in.program import NodeStep, SizeTerm

_SHAPES = {("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Tile", 1), ("Slice", 2), ("Range", 1)}
"""Which input of an operator is a shape, an end or a count."""

FreeSizes = dict[str, tuple[SizeTerm, ...] | SizeTerm]


def free_sizes(
    steps: Sequence[NodeStep], constants: Mapping[str, Tensor], root: Sequence[int], feature: int
) -> tuple[list[NodeStep], FreeSizes]:
    """The steps with free sizes, and the sizes by name.

    Args:
        root: the shape of the region's first input. feature: its axis that is no row.
    """
    terms = _terms(root, feature % len(root))
    made: list[NodeStep] = []
    sizes: FreeSizes = {}
    filled: dict[str, str] = {}
    for step in steps:
        inputs = list(step.inputs)
        for number, name in enumerate(inputs):
            if name not in constants:
                continue
            value = constants[name]
            if (step.op_type, number) in _SHAPES and value.dtype == torch.int64 and value.dim() <= 1:
                inputs[number] = _as_size(name, value, terms, sizes)
            elif value.numel() > 1 and any(n in terms for n in value.shape):
                if name not in filled:
                    filled[name] = _unfolded(name, value, terms, sizes, made)
                inputs[number] = filled[name]
        made.append(replace(step, inputs=tuple(inputs)))
    return made, sizes


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


def _as_size(name: str, value: Tensor, terms: Mapping[int, SizeTerm], sizes: FreeSizes) -> str:
    """The name of a constant shape with the sizes in it; its own where there is none."""
    numbers = value.reshape(-1).tolist()
    if not any(n in terms for n in numbers):
        return name
    made = [terms.get(n, SizeTerm(n)) for n in numbers]
    sizes[f"{name}.size"] = tuple(made) if value.dim() else made[0]
    return f"{name}.size"


def _unfolded(name: str, value: Tensor, terms: Mapping[int, SizeTerm], sizes: FreeSizes, steps: list[NodeStep]) -> str:
    """The name of a fill or a count as it was before it was folded; the constant's own for any other."""
    flat = value.reshape(-1)
    shape = tuple(terms.get(n, SizeTerm(n)) for n in value.shape)
    if bool((flat == flat[0]).all()):
        sizes[f"{name}.shape"] = shape
        attributes = {"value": flat[:1].clone()}
        steps.append(NodeStep("", "ConstantOfShape", f"{name}.fill", (f"{name}.shape",), (f"{name}.fill",), attributes))
        return f"{name}.fill"
    if value.dim() == 1 and value.dtype == torch.int64 and torch.equal(value, torch.arange(len(value))):
        sizes |= {f"{name}.zero": SizeTerm(0), f"{name}.one": SizeTerm(1), f"{name}.count": shape[0]}
        reads = (f"{name}.zero", f"{name}.count", f"{name}.one")
        steps.append(NodeStep("", "Range", f"{name}.range", reads, (f"{name}.range",)))
        return f"{name}.range"
    return name

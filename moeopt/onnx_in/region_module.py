"""Regions of a graph as modules: one for each, at the path that its name says, and one that calls them all.

Sizes that a region reads from elsewhere (the number of rows, computed from the shape of the model's input) are told by
value: on two runs in different sizes, each must be a constant or a product of sizes of the region's own entries.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeopt.errors import Declined
from moeopt.onnx_in.cuts import GraphRegion
from moeopt.onnx_in.interpreter import InterpretedGraph, steps_of, tensor_of
from moeopt.onnx_in.program import SizeTerm, SizeTerms, program_of
from moeopt.value_types import OnnxValue, PyObject


@dataclass(frozen=True)
class RegionEnds:
    """The entries of a region that are tensors for it, and those that are sizes, as products of the former's sizes."""

    tensors: tuple[str, ...]
    sizes: SizeTerms


def region_ends(region: GraphRegion, runs: Sequence[Mapping[str, Tensor]]) -> RegionEnds:
    """Which entries are sizes, told by their values on ``runs``; whole numbers that are no sizes stay tensors.

    Raises:
        Declined: a number with a fraction that no entry's size explains cannot be told from a size here.
    """
    names = [v.name for v in region.entries]
    whole = [n for n in names[1:] if all(_may_be_size(run[n]) for run in runs)]
    tensors = [n for n in names if n not in whole]
    sizes: dict[str, tuple[SizeTerm, ...] | SizeTerm] = {}
    for name in whole:
        terms = _terms(name, tensors, runs)
        if terms is None:
            tensors.append(name)
        else:
            sizes[name] = terms
    return RegionEnds(tuple(tensors), sizes)


def _may_be_size(value: Tensor) -> bool:
    return value.dtype in (torch.int64, torch.int32) and value.dim() <= 1 and value.numel() <= 8


def _terms(
    name: str, tensors: Sequence[str], runs: Sequence[Mapping[str, Tensor]]
) -> tuple[SizeTerm, ...] | SizeTerm | None:
    values = [run[name].reshape(-1).tolist() for run in runs]
    if len({len(v) for v in values}) != 1:
        return None
    dims = [(n, d) for n, tensor in enumerate(tensors) for d in range(runs[0][tensor].dim())]
    found = []
    for numbers in zip(*values, strict=True):
        term = _term(numbers, dims, tensors, runs)
        if term is None:
            return None
        found.append(term)
    return tuple(found) if runs[0][name].dim() else found[0]


def _term(
    numbers: Sequence[int],
    dims: Sequence[tuple[int, int]],
    tensors: Sequence[str],
    runs: Sequence[Mapping[str, Tensor]],
) -> SizeTerm | None:
    free = [(n, d) for n, d in dims if len({run[tensors[n]].shape[d] for run in runs}) > 1]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(free, count):
            made = [math.prod(run[tensors[n]].shape[d] for n, d in chosen) for run in runs]
            if made == list(numbers):
                return SizeTerm(1, chosen)
    return SizeTerm(numbers[0], ()) if len(set(numbers)) == 1 and (len(runs) > 1 or not free) else None


def region_module(region: GraphRegion, ends: RegionEnds, opset: int, name: str) -> InterpretedGraph:
    """A region as a module that takes ``ends.tensors`` in order and returns its exit.

    Its steps are called by their numbers, so that regions of several layers have one program; ``named`` turns these
    into the names of nodes in a sentence.

    Raises:
        Declined: it holds an operator that the interpreter does not run; the message names the node.
    """
    steps, constants = steps_of(region.nodes)
    made = {name for step in steps for name in step.outputs}
    known = {*made, *constants, *ends.tensors, *ends.sizes}
    for node in region.nodes:
        for value in node.inputs:
            if value is not None and value.name not in known:
                constants[value.name] = tensor_of(_held(value), value.name)
                known.add(value.name)
    return InterpretedGraph(*program_of(steps, ends.tensors, [region.exit.name], constants, opset, ends.sizes, name))


def named(reason: str, region: GraphRegion) -> str:
    """A sentence about a region's module with the names of the file's nodes."""
    nodes = [node for node in region.nodes if node.op_type != "Constant"]
    return re.sub(r"'#(\d+)'", lambda match: repr(nodes[int(match[1])].name), reason)


def _held(value: OnnxValue) -> OnnxValue:
    if value.const_value is None:
        raise Declined(f"the value {value.name!r} is read in it and made nowhere")
    return value.const_value


class GraphRegions(nn.Module):
    """The regions of one file, side by side.

    Args:
        parts: for each its path, its module and which of the call's values it takes.
    """

    def __init__(self, parts: Sequence[tuple[str, nn.Module, Sequence[int]]]) -> None:
        super().__init__()
        self.parts = tuple((path, tuple(slots)) for path, _, slots in parts)
        for path, module, _ in parts:
            home: nn.Module = self
            *above, last = path.split(".")
            for name in above:
                if name not in home._modules:
                    home.add_module(name, nn.Module())
                home = home.get_submodule(name)
            home.add_module(last, module)

    def keep(self, paths: Sequence[str]) -> None:
        """Call only the regions at ``paths`` from here on."""
        self.parts = tuple((path, slots) for path, slots in self.parts if path in paths)

    def forward(self, *values: Tensor) -> tuple[PyObject, ...]:
        return tuple(self.get_submodule(path)(*(values[n] for n in slots)) for path, slots in self.parts)

"""Regions of a graph as modules: one for each, at the path that its name says, and one that calls them all.

Sizes that a region reads from elsewhere (the number of rows, computed from the shape of the model's input) are told by
value: on two runs in different sizes, each must be a constant, a product of sizes of the region's own entries, or a
multiple of such a product.
"""

from __future__ import annotations

import itertools
import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moeopt.errors import Declined
from moeopt.onnx_in.chains import matrices
from moeopt.onnx_in.coded import CodedWeights, coded_weights
from moeopt.onnx_in.coded_nodes import CodedConstants
from moeopt.onnx_in.cuts import GraphRegion
from moeopt.onnx_in.experts_apart import ExpertsApart
from moeopt.onnx_in.interpreter import InterpretedGraph, live_steps, steps_of
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.table import OPERATORS
from moeopt.onnx_in.places import from_zero_told
from moeopt.onnx_in.products import CONVOLUTIONS, MOVING, shape_of
from moeopt.onnx_in.program import NodeStep, SizeTerm, SizeTerms, program_of
from moeopt.onnx_in.regions import CandidateRegion
from moeopt.onnx_in.shared_weights import each_its_own
from moeopt.onnx_in.static_sizes import free_sizes
from moeopt.onnx_in.tensors import tensor_of
from moeopt.value_types import OnnxValue, PyObject


@dataclass(frozen=True)
class RegionEnds:
    """The entries of a region that are tensors for it, and those that are sizes, as products of the former's sizes.

    ``fixed``: of a file that runs in one size only, the shape of the root and its axis that is no row; ``values``: what
    the tensors are on that size, or on the largest where shapes must be known.
    """

    tensors: tuple[str, ...]
    sizes: SizeTerms
    fixed: tuple[tuple[int, ...], int] | None = None
    values: tuple[Tensor, ...] = ()


def region_ends(candidate: CandidateRegion, region: GraphRegion, runs: Sequence[Mapping[str, Tensor]]) -> RegionEnds:
    """Which entries are sizes, told by their values on ``runs``; other whole numbers stay tensors: what a caller gives,
    or data decide, may be the same on all of the runs, and another number in the next call.
    """
    names, index = [v.name for v in region.entries], candidate.index
    sized = {v.name for v in region.entries[1:] if index.is_size(v) or index.is_fill(v)}
    whole = [n for n in names if n in sized and all(_may_be_size(run[n]) for run in runs)]
    tensors = [n for n in names if n not in whole]
    sizes: dict[str, tuple[SizeTerm, ...] | SizeTerm] = {}
    for name in whole:
        terms = _terms(name, tensors, runs)
        if terms is None:
            tensors.append(name)
        else:
            sizes[name] = terms
    fixed = None
    if len(runs) == 1:
        fixed = tuple(runs[0][tensors[0]].shape), feature_axis(candidate)
    most = max(runs, key=lambda run: run[tensors[0]].numel())
    return RegionEnds(tuple(tensors), sizes, fixed, tuple(most[n] for n in tensors) if fixed or region.apart else ())


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
    products = [
        (chosen, [math.prod(run[tensors[n]].shape[d] for n, d in chosen) for run in runs])
        for count in (1, 2, 3)
        for chosen in itertools.combinations(free, count)
    ]
    for chosen, made in products:
        if made == list(numbers):
            return SizeTerm(1, chosen)
    if len(set(numbers)) == 1 and (len(runs) > 1 or not free):
        return SizeTerm(numbers[0], ())
    for chosen, made in products if len(runs) > 1 else ():  # so many for each row: what each token chooses
        factor = numbers[0] // max(1, made[0])
        if factor > 1 and [factor * size for size in made] == list(numbers):
            return SizeTerm(factor, chosen)
    return None


_nodes: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()
"""The nodes that the steps of a region's module were: kept apart, so that modules of alike layers are alike."""


def region_module(
    region: GraphRegion, ends: RegionEnds, opset: int, name: str, *, to_lower: bool = False,
    codes: CodedConstants | None = None,
) -> InterpretedGraph:  # fmt: skip
    """A region as a module that takes ``ends.tensors`` in order and returns its exit.

    Args:
        to_lower: it becomes ONNX nodes again, and nobody writes to its constants. A ``Clip`` of one bound is then a
            clamp of one, which is lowered to a ``Clip`` of one; else it is what ONNX Runtime makes of it, a clamp of
            two that no kernel is written for.
        codes: reads what the file holds as codes; given for all regions of a file, each constant is read once.

    Its steps are called by their numbers, so that regions of several layers have one program; ``with_node_names``
    turns these into the names of nodes in a sentence.

    Raises:
        Declined: it holds an operator that the interpreter does not run; the message names the node.
    """
    codes = CodedConstants(opset, region.nodes) if codes is None else codes
    steps, constants = steps_of(region.nodes, codes)
    steps = from_zero_told(live_steps(steps, [region.exit.name]))
    if to_lower:
        steps = [replace(s, attributes={**s.attributes, "unbounded": 1}) if s.op_type == "Clip" else s for s in steps]
    made = {name for step in steps for name in step.outputs}
    known = {*made, *constants, *ends.tensors, *ends.sizes}
    wanted = {name for step in steps for name in step.inputs}
    for node in region.nodes:
        for value in node.inputs:
            if value is not None and value.name in wanted and value.name not in known:
                constants[value.name] = tensor_of(_held(value), value.name)
                known.add(value.name)
    if region.folds:
        steps = _folded(steps, constants, opset)
    if region.shares:
        steps = each_its_own(steps, constants)
    sizes = dict(ends.sizes)
    if region.apart:
        shapes, result = _shapes(steps, constants, ends, region, opset), [region.exit.name]
        steps = live_steps(ExpertsApart(steps, constants, shapes, dict(region.apart)).steps(result), result)
    if ends.fixed is not None:
        steps, freed = free_sizes(steps, constants, *ends.fixed, _shapes(steps, constants, ends, region, opset))
        sizes |= freed
    read = dict.fromkeys(name for step in steps for name in step.inputs)  # in the order of the experts
    constants = {value: constants[value] for value in read if value in constants}
    module = InterpretedGraph(*program_of(steps, ends.tensors, [region.exit.name], constants, opset, sizes, name))
    module.never_changes = to_lower
    _nodes[module] = tuple(step.name for step in steps)
    module.coded = CodedWeights([one for value, one in codes.found.items() if value in constants])
    return module


def _shapes(
    steps: Sequence[NodeStep], constants: Mapping[str, Tensor], ends: RegionEnds, region: GraphRegion, opset: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the steps make on the file's own size, as far as they can be run."""
    read = {name for step in steps for name in step.inputs}
    held = {name: value for name, value in constants.items() if name in read}
    program, tensors = program_of(steps, ends.tensors, [region.exit.name], held, opset, ends.sizes, "")
    both = zip(steps, program.steps, strict=True)
    inner = dict(pair for step, own in both for pair in zip(own.outputs, step.outputs, strict=True))
    found: dict[str, tuple[int, ...]] = dict(zip(ends.tensors, (tuple(v.shape) for v in ends.values), strict=True))
    try:
        env = InterpretedGraph(program, tensors).run(ends.values, tuple(inner))
    except Exception:  # torch's own, of many classes: whoever runs the region says why it stops
        return found
    return found | {inner[n]: tuple(v.shape) for n, v in env.items() if n in inner and isinstance(v, Tensor)}


def _folded(steps: Sequence[NodeStep], constants: dict[str, Tensor], opset: int) -> list[NodeStep]:
    """The steps without those that bring constants into shape; what they make is among ``constants`` then."""
    kept = []
    for step in steps:
        there = all(name in constants for name in step.inputs if name)
        if step.domain or step.op_type not in MOVING or not there or not constants[step.inputs[0]].is_floating_point():
            kept.append(step)
            continue
        inputs = [constants[name] if name else None for name in step.inputs]
        made = OPERATORS["", step.op_type](NodeCall(step.described, inputs, step.attributes, len(step.outputs), opset))
        constants |= zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=False)
    return kept


def with_node_names(reason: str, module: InterpretedGraph) -> str:
    """A sentence about a region's module with the names of the file's nodes."""
    return re.sub(r"'#(\d+)'", lambda match: repr(_nodes[module][int(match[1])]), reason)


def _held(value: OnnxValue) -> OnnxValue:
    if value.const_value is None:
        raise Declined(f"the value {value.name!r} is read in it and made nowhere")
    return value.const_value


def is_combined(candidate: CandidateRegion, region: GraphRegion, runs: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether an exit holds one row for each row of the root, as wide as a weight of the region says; or, of experts
    that give one number each, one number without an axis of its own."""
    rows, result = runs[0][region.entries[0].name], runs[0][region.exit.name]
    axis = feature_axis(candidate)
    if not result.is_floating_point() or rows.dim() < 2:
        return False
    if one_number_each(candidate) and result.numel() * rows.shape[axis] == rows.numel():
        return True
    if result.dim() <= max(axis, 0):
        return False
    return result.numel() * rows.shape[axis] == rows.numel() * result.shape[axis] and _is_width(
        result.shape[axis], candidate, region
    )


def one_number_each(candidate: CandidateRegion) -> bool:
    """Whether the experts' last products have one output: the results of all of them side by side are no sum."""
    return any(1 in last.shape for _, last in candidate.chains.pairs)


def feature_axis(candidate: CandidateRegion) -> int:
    """The axis of a region's rows that its products sum over."""
    return 1 if candidate.chains.products[0].node.op_type in CONVOLUTIONS else -1


def _is_width(size: int, candidate: CandidateRegion, region: GraphRegion) -> bool:
    """Whether a weight of the region has that size, or a matrix that is a part of one."""
    held = (shape_of(v) or () for n in region.nodes for v in n.inputs if v is not None)
    beside = (size * p.of_all in p.shape for p in candidate.chains.products if p.of_all)
    return (
        any(size in shape for shape in held)
        or any(size in shape for shape, *_ in matrices(candidate.chains))
        or any(beside)
    )


class GraphRegions(nn.Module):
    """The regions of one file, side by side.

    Args:
        parts: for each its path, its module and which of the call's values it takes.
    """

    def __init__(self, parts: Sequence[tuple[str, nn.Module, Sequence[int]]]) -> None:
        super().__init__()
        self.region_slots = tuple((path, tuple(slots)) for path, _, slots in parts)
        for path, module, _ in parts:
            add_at(self, path, module)
        self.coded = CodedWeights([one for _, module, _ in parts for one in coded_weights(module)])

    def keep(self, paths: Sequence[str]) -> None:
        """Call only the regions at ``paths`` from here on."""
        kept = set(paths)
        self.region_slots = tuple((path, slots) for path, slots in self.region_slots if path in kept)

    def forward(self, *values: Tensor) -> tuple[PyObject, ...]:
        return tuple(self.get_submodule(path)(*(values[n] for n in slots)) for path, slots in self.region_slots)


def add_at(home: nn.Module, path: str, module: nn.Module) -> None:
    """Make ``module`` the submodule of ``home`` at ``path``, with empty modules on the way."""
    *above, last = path.split(".")
    for name in above:
        if name not in home._modules:
            home.add_module(name, nn.Module())
        home = home.get_submodule(name)
    home.add_module(last, module)

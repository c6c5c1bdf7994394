"""A whole file as an ``nn.Module``, each region that may be experts a child of its own.

Limits: opset 13 or newer; every operator one that the interpreter runs; no ``If``, ``Loop`` or ``Scan`` that ``unroll``
does not write out; tensors at the ends. Weights are the file's own mapped bytes. The module runs node after node, which
is no quick way to run a graph: it is there to be read, counted, profiled, changed and optimised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moeopt.errors import Declined, MoeoptError, UsageError
from moeopt.listed import arguments
from moeopt.onnx_in.coded_nodes import CodedConstants
from moeopt.onnx_in.cuts import GraphRegion
from moeopt.onnx_in.ends import graph_inputs
from moeopt.onnx_in.feeds import given_feeds, made_up_feeds
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.interpreter import InterpretedGraph, live_steps, steps_of
from moeopt.onnx_in.program import GraphProgram, NodeStep, program_of
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.region_module import RegionEnds, add_at, is_combined, region_ends, region_module
from moeopt.onnx_in.regions import CandidateRegion, candidate_regions
from moeopt.onnx_in.tensors import tensor_of
from moeopt.onnx_in.values import tensor
from moeopt.untrusted import shown, shown_line
from moeopt.value_types import PyObject

REGION = "moeopt.region"
"""The domain of a step that calls a child."""
_PLAIN = (Tensor, nn.Parameter, int, float, bool, list, tuple, type(None))
_TRIES = (RuntimeError, ValueError, IndexError, TypeError)


class InterpretedFile(InterpretedGraph):
    """A whole graph: call it with its inputs in order or by name; it returns its outputs, one alone or a tuple.

    Args:
        children: the regions, by their paths.

    Attributes:
        example: inputs by name that the graph was run on, {} where none was found.
        chains_of_regions: how many chains of products each has, by its path.
    """

    def __init__(self, program: GraphProgram, tensors: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> None:
        super().__init__(program, tensors)
        self.names = program.inputs
        self.example: dict[str, Tensor] = {}
        self.chains_of_regions: dict[str, int] = {}
        for path, child in children.items():
            add_at(self, path, child)

    def forward(self, *values: Tensor, **named: Tensor) -> PyObject:
        given = dict(zip(self.names, values, strict=False)) | named
        if len(values) + len(named) != len(self.names) or set(given) != set(self.names):
            raise UsageError(f"the graph takes {', '.join(self.names)}; it was given {arguments(values, named)}")
        return super().forward(*(given[name] for name in self.names))

    def _run_step(self, step: NodeStep, inputs: Sequence[Any]) -> Sequence[Any]:
        if step.domain == REGION:
            return (self.get_submodule(step.op_type)(*(tensor(value) for value in inputs)),)
        try:
            return super()._run_step(step, inputs)
        except _TRIES as err:
            if isinstance(err, MoeoptError) or any(type(v) not in _PLAIN for v in inputs):  # not while it is traced
                raise
            raise RuntimeError(_failed(step, inputs, err)) from err


def _failed(step: NodeStep, inputs: Sequence[Any], err: Exception) -> str:
    """What a node that fails says: the node, what it was given, the operator's own words and the way out."""
    given = ", ".join(
        f"{shown(name)} {list(v.shape)} {str(v.dtype).removeprefix('torch.')}" if isinstance(v, Tensor) else shown(name)
        for name, v in zip(step.inputs, inputs, strict=False)
        if v is not None
    )
    return (
        f"{step.described} fails on {given}: {shown_line(err)[:200]}; give inputs of the sizes and types that the file "
        "was made for; where ONNX Runtime refuses them too, the file was damaged or edited"
    )


def interpreted(file: OnnxFile, inputs: PyObject = None) -> InterpretedFile:
    """A file as a module in eval mode, its regions as children.

    Args:
        inputs: of the graph, in the forms of ``moeopt.optimize``; None: some are made up, to tell sizes from constants.

    Raises:
        UsageError: it holds an operator or a body that the interpreter does not run; the message names the node.
    """
    names = [value.name for value in graph_inputs(file.proto.graph)]
    nodes = list(file.model.graph)
    codes = CodedConstants(file.opset, nodes)
    try:
        steps, constants = steps_of(nodes, codes)
    except Declined as err:
        raise UsageError(f"{file.name} has no form as a module: {err.reason}") from None
    constants |= {
        name: tensor_of(value.const_value, name)
        for name, value in file.model.graph.initializers.items()
        if value.const_value is not None and name not in names
    }
    outputs = [value.name for value in file.model.graph.outputs]
    candidates = list(candidate_regions(GraphIndex(file.model.graph)))
    steps = live_steps(
        steps, [*outputs, *(v.name for c in candidates for r in c.regions for v in (*r.entries, r.exit))]
    )
    flat = InterpretedFile(*program_of(steps, names, outputs, constants, file.opset), {}).eval()
    examples, runs = _runs(file, flat, candidates, inputs)
    children, kept = _children(codes, candidates, runs, steps, outputs)
    read = {name for step in kept for name in step.inputs} | set(outputs)
    rest = {name: value for name, value in constants.items() if name in read}
    made = InterpretedFile(*program_of(kept, names, outputs, rest, file.opset), children).eval()
    made.example = examples[0] if examples else {}
    made.chains_of_regions = {c.name: c.chains.experts for c in candidates if c.name in children}
    return made


def _runs(
    file: OnnxFile, flat: InterpretedGraph, candidates: Sequence[CandidateRegion], inputs: PyObject
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """One call, or two in other sizes, and the values at the ends of all regions on each; [] where none runs."""
    wanted = {v.name for c in candidates for r in c.regions for v in (*r.entries, r.exit)}
    found: list[dict[str, Tensor]] = []
    examples: list[dict[str, Tensor]] = []
    for feeds in made_up_feeds(file, 0) if inputs is None else [given_feeds(file, inputs)]:
        try:
            env = flat.run([feeds[name] for name in flat.program.inputs], sorted(wanted))
        except Declined as err:  # an attribute that the interpreter does not read: no other sizes change that
            raise UsageError(f"{file.name} has no form as a module: {err.reason}") from None
        except _TRIES as err:
            if inputs is not None:
                raise UsageError(f"{file.name} does not run on the inputs that were given: {shown_line(err)}") from err
            continue
        found.append({name: tensor(env[name]) for name in wanted})
        examples.append(feeds)
        if len(found) == 2:
            break
    return examples, found


def _children(
    codes: CodedConstants, candidates: Sequence[CandidateRegion], runs: Sequence[Mapping[str, Tensor]],
    steps: Sequence[NodeStep], outputs: Sequence[str],
) -> tuple[dict[str, nn.Module], list[NodeStep]]:  # fmt: skip
    """The regions as modules by their paths, and the steps with a call of each in the place of its last."""
    chosen: dict[str, tuple[GraphRegion, RegionEnds, nn.Module]] = {}
    for candidate in candidates if runs else ():
        for region in candidate.regions:
            if not is_combined(candidate, region, runs):
                continue
            ends = region_ends(candidate, region, runs)
            chosen[candidate.name] = (
                region,
                ends,
                region_module(region, ends, codes.opset, candidate.name, codes=codes).eval(),
            )
            break
    exits = {region.exit.name: path for path, (region, _, _) in chosen.items()}
    inside = {v.name for region, _, _ in chosen.values() for node in region.nodes for v in node.outputs}
    needed = set(outputs) | {name for _, ends, _ in chosen.values() for name in ends.tensors}
    needed |= {name for step in steps if not inside & set(step.outputs) for name in step.inputs}
    kept: list[NodeStep] = []
    for step in reversed(steps):
        path = next((exits[name] for name in step.outputs if name in exits), None)
        if path is not None:
            region, ends, _ = chosen[path]
            kept.append(NodeStep(REGION, path, path, ends.tensors, (region.exit.name,)))
        elif not inside & set(step.outputs) or needed & set(step.outputs):
            kept.append(step)
            needed |= set(step.inputs)
    return {path: module for path, (_, _, module) in chosen.items()}, kept[::-1]

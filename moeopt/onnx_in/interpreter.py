"""Nodes of an ONNX graph as a module of torch: its parameters are the initializers, in the file's own mapped bytes.

The module runs node after node as ATen calls, so that what reads modules (capture, recognition, export) reads a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moeopt.errors import Declined
from moeopt.onnx_in.coded import CodedWeights
from moeopt.onnx_in.coded_nodes import CodedConstants, is_quantised, named, unread_codes
from moeopt.onnx_in.dtypes import FLOATS
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.sizes import on_sizes
from moeopt.onnx_in.operators.table import OPERATORS, operator_of
from moeopt.onnx_in.program import GraphProgram, NodeStep
from moeopt.onnx_in.tensors import attribute_value, constant_of
from moeopt.onnx_in.values import SizeValue, all_known, tensor
from moeopt.value_types import OnnxNode, PyObject


class InterpretedGraph(nn.Module):
    """A part of an ONNX graph. Call it with its inputs in order; it returns its outputs, one alone or a tuple.

    Args:
        program: its steps; one object for all parts that are the same but for their weights.
        tensors: the constants that are no plain numbers, by attribute; floating ones become parameters.

    Attributes:
        coded: which of these the file holds as codes.
    """

    of_a_file = True
    """What is said of its calls speaks of a graph, and not of a forward."""

    never_changes = False
    """Whether its constants keep their values: it becomes a part of a file again, and nobody else has it."""

    def __init__(self, program: GraphProgram, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.program = program
        self.coded = CodedWeights()
        for attribute, value in tensors.items():
            if value.dtype in FLOATS:
                setattr(self, attribute, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(attribute, value)

    def forward(self, *values: Tensor) -> PyObject:
        env = self.run(values)
        results = [tensor(self._value(name, env)) for name in self.program.outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, values: Sequence[Tensor], keep: Sequence[str] = ()) -> dict[str, Any]:
        """The values called ``keep``, and the outputs, for these inputs."""
        program = self.program
        env: dict[str, Any] = dict(zip(program.inputs, values, strict=True))
        for name, terms in program.sizes.items():
            found = [t.of(values) for t in terms] if isinstance(terms, tuple) else terms.of(values)
            env[name] = SizeValue(found)
        for step, frees in zip(program.steps, program.frees, strict=True):
            results = self._run_step(step, [self._value(name, env) for name in step.inputs])
            env.update(zip(step.outputs, results, strict=False))
            for name in frees:
                if name not in keep:
                    env.pop(name, None)
        return env

    def _value(self, name: str, env: Mapping[str, Any]) -> PyObject:
        if not name:
            return None
        if name in env:
            return env[name]
        if name in self.program.numbers:
            return self.program.numbers[name]
        return getattr(self, self.program.constants[name])

    def _run_step(self, step: NodeStep, inputs: Sequence[Any]) -> Sequence[Any]:
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        call = NodeCall(step.described, inputs, step.attributes, len(step.outputs), self.program.opset)
        made = on_sizes(step.op_type, call) if not step.domain and all_known(inputs) else None
        if made is None:
            made = OPERATORS[step.domain, step.op_type](call)
        return made if isinstance(made, tuple) else (made,)


def steps_of(nodes: Sequence[OnnxNode], codes: CodedConstants) -> tuple[list[NodeStep], dict[str, Tensor]]:
    """Nodes of ``onnx_ir`` as steps, and the constants that nodes among them hold, by name.

    Args:
        codes: reads the constants that are stored as codes; their floats are among the constants.

    Raises:
        Declined: an operator that the interpreter does not run; the message names the node.
    """
    steps: list[NodeStep] = []
    constants: dict[str, Tensor] = {}
    for node in nodes:
        domain = operator_of(node)[0]
        if (domain, node.op_type) == ("", "Constant"):
            constants[node.outputs[0].name] = constant_of(node)
            continue
        if is_quantised(node):
            steps += codes.read(node)
            continue
        if (domain, node.op_type) not in OPERATORS:
            raise Declined(unread(node))
        steps.append(
            NodeStep(
                domain,
                node.op_type,
                node.name or "",
                tuple("" if v is None else v.name for v in node.inputs),
                tuple(v.name for v in node.outputs),
                {name: attribute_value(a, node.name) for name, a in node.attributes.items()},
            )
        )
    names = {v.name for node in nodes for v in node.outputs} | {name for step in steps for name in step.inputs}
    constants |= {name: codes.codes[name] for name in names & codes.codes.keys()}
    return steps, constants | {name: codes.found[name].floats for name in names & codes.found.keys()}


def live_steps(steps: Sequence[NodeStep], outputs: Sequence[str]) -> list[NodeStep]:
    """The steps that ``outputs`` need: those that moved codes which are constants now are not among them."""
    needed, kept = set(outputs), list[NodeStep]()
    for step in reversed(steps):
        if not needed.isdisjoint(step.outputs):
            kept.append(step)
            needed |= set(step.inputs)
    return kept[::-1]


def unread(node: OnnxNode) -> str:
    """The reason for an operator that the interpreter does not run: the node's name and the way out."""
    if is_quantised(node):
        return unread_codes(node)
    if node.op_type in ("If", "Loop", "Scan") and not operator_of(node)[0]:
        return (
            f"{named(node)}, whose body is run or not as data say, or as often as they say, and moeopt reads nodes "
            "that stand in the graph itself: export the model without that branch or loop; moeopt.optimize takes the "
            "file, and leaves such nodes outside of its blocks as they are"
        )
    return (
        f"{named(node)}, which moeopt does not read inside experts: export the model with plain operators there, "
        "or optimise the PyTorch model itself"
    )

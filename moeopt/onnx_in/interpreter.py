"""Nodes of an ONNX graph as a module of torch: its parameters are the initializers, in the file's own mapped bytes.

The module runs node after node as ATen calls, so that what reads modules (capture, recognition, export) reads a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeopt.errors import Declined
from moeopt.onnx_in.dtypes import FLOATS, torch_dtype
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.sizes import on_sizes
from moeopt.onnx_in.operators.table import OPERATORS, shown
from moeopt.onnx_in.program import GraphProgram, NodeStep
from moeopt.onnx_in.values import SizeValue, all_known, tensor
from moeopt.value_types import OnnxNode, OnnxValue, PyObject

QUANTISED = frozenset(
    ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger")
    + ("QLinearConv", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "DequantizeBFP", "MatMulIntegerToFloat", "QGemm")
    + ("DynamicQuantizeMatMul", "GatherBlockQuantized", "QLinearSigmoid", "QLinearMul", "QLinearAdd")
)
"""Operators that make floats of a quantised model's codes, or compute with codes."""


class InterpretedGraph(nn.Module):
    """A part of an ONNX graph. Call it with its inputs in order; it returns its outputs, one alone or a tuple.

    Args:
        program: its steps; one object for all parts that are the same but for their weights.
        tensors: the constants that are no plain numbers, by attribute; floating ones become parameters.
    """

    def __init__(self, program: GraphProgram, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.program = program
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


def steps_of(nodes: Sequence[OnnxNode]) -> tuple[list[NodeStep], dict[str, Tensor]]:
    """Nodes of ``onnx_ir`` as steps, and the constants that nodes among them hold, by name.

    Raises:
        Declined: an operator that the interpreter does not run; the message names the node.
    """
    steps: list[NodeStep] = []
    constants: dict[str, Tensor] = {}
    for node in nodes:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) == ("", "Constant"):
            constants[node.outputs[0].name] = constant_of(node)
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
    return steps, constants


def unread(node: OnnxNode) -> str:
    """The reason for an operator that the interpreter does not run: the node's name and the way out."""
    name = f"the node {node.name!r} is {shown('' if node.domain == 'ai.onnx' else node.domain, node.op_type)}"
    if node.op_type in QUANTISED:
        return (
            f"{name}: the block is quantised, and moeopt reads experts of plain floats; optimise the file from before "
            "it was quantised, or the PyTorch model with quantize='int8' or 'int4'"
        )
    return (
        f"{name}, which moeopt does not read inside experts: export the model with plain operators there, or optimise "
        "the PyTorch model itself"
    )


def constant_of(node: OnnxNode) -> Tensor:
    """The tensor that a ``Constant`` node holds."""
    (attribute,) = node.attributes.values()
    value = attribute_value(attribute, node.name)
    if isinstance(value, Tensor):
        return value
    dtype = torch.float32 if "float" in attribute.name else torch.int64
    if isinstance(value, (str, bytes)) or "string" in attribute.name:
        raise Declined(f"the node {node.name!r} holds text, which torch does not have")
    return torch.tensor(value, dtype=dtype)


def attribute_value(attribute: OnnxValue, where: str) -> PyObject:
    """An attribute of ``onnx_ir`` as a Python value or a tensor."""
    import onnx_ir as ir

    kinds = ir.AttributeType
    if attribute.type == kinds.TENSOR:
        return tensor_of(attribute.value, where)
    if attribute.type in (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.STRINGS):
        value = attribute.value
        return list(value) if isinstance(value, (tuple, list)) else value
    raise Declined(f"the node {where!r} has the attribute {attribute.name!r} of a kind that moeopt does not read")


def _mapped(value: OnnxValue) -> PyObject:
    """The bytes of a tensor in its file, mapped; onnx_ir itself reads no file that has two names (a hard link)."""
    shape = tuple(int(n) for n in value.shape)
    if 0 in shape:
        return np.empty(shape, value.dtype.numpy())
    return np.memmap(value.path, value.dtype.numpy(), "r", value.offset or 0, shape)


def tensor_of(value: OnnxValue, where: str) -> Tensor:
    """A tensor of ``onnx_ir`` as torch's, in the same bytes where they are mapped from a file.

    Raises:
        Declined: torch has no such element type, or what it holds is not numbers.
    """
    import onnx_ir as ir

    dtype = torch_dtype(value.dtype, f"the tensor {value.name or where!r}")
    array = _mapped(value) if isinstance(value, ir.ExternalTensor) and value.dtype.bitwidth >= 8 else value.numpy()
    if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        array = array.astype("int8" if value.dtype == ir.DataType.INT4 else "uint8")
        return torch.from_numpy(array)
    if dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        array = array.view("int16" if dtype == torch.bfloat16 else "uint8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mapped bytes are read-only, and nothing writes to a constant
        found = torch.from_numpy(array)
    return found if found.dtype == dtype else found.view(dtype)

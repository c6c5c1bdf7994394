"""Nodes of an ONNX graph as a module of torch: its parameters are the initializers, in the file's own mapped bytes.

The module runs node after node as ATen calls, so that what reads modules (capture, recognition, export) reads a graph.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.errors import Declined
from moeopt.onnx_in.dtypes import FLOATS, torch_dtype
from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.sizes import on_sizes
from moeopt.onnx_in.operators.table import OPERATORS, shown
from moeopt.onnx_in.values import GraphValue, SizeValue, all_known, tensor
from moeopt.value_types import OnnxNode, OnnxValue, PyObject

MOST_NUMBERS = 64
"""Of a constant of whole numbers that may be a shape: longer ones are data."""


@dataclass(frozen=True)
class NodeStep:
    """One node: operator, names of what it reads and makes ("" for none), and its attributes as Python values."""

    domain: str
    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """For messages."""
        return f"the node {self.name!r} ({shown(self.domain, self.op_type)})"


@dataclass(frozen=True)
class SizeTerm:
    """A size as a product: a number times sizes of inputs, each given as (number of the input, dimension)."""

    factor: int
    dims: tuple[tuple[int, int], ...] = ()

    def of(self, inputs: Sequence[Tensor]) -> PyObject:
        """Its value for these inputs."""
        product: Any = self.factor
        for number, dim in self.dims:
            product = (
                inputs[number].shape[dim]
                if product == 1 and isinstance(product, int)
                else product * inputs[number].shape[dim]
            )
        return product


class InterpretedGraph(nn.Module):
    """A part of an ONNX graph. Call it with its inputs in order; it returns its outputs, one alone or a tuple.

    Args:
        steps: its nodes in topological order.
        inputs, outputs: names of values.
        constants: tensors by the names of the values that they are; floating ones of a rank become parameters.
        opset: the version of ONNX's own operators.
        sizes: values that are sizes of the inputs.
    """

    def __init__(
        self,
        steps: Sequence[NodeStep],
        inputs: Sequence[str],
        outputs: Sequence[str],
        constants: Mapping[str, Tensor],
        opset: int,
        sizes: Mapping[str, tuple[SizeTerm, ...] | SizeTerm] | None = None,
    ) -> None:
        super().__init__()
        self._steps, self._inputs, self._outputs, self._opset = tuple(steps), tuple(inputs), tuple(outputs), opset
        self._sizes = dict(sizes or {})
        self._constants: dict[str, str] = {}
        self._numbers: dict[str, SizeValue] = {}
        for name, value in constants.items():
            self._hold(name, value)
        last = {name: number for number, step in enumerate(self._steps) for name in step.inputs}
        self._frees = tuple(
            tuple(n for n in {*step.inputs, *step.outputs} if n not in self._outputs and last.get(n, number) == number)
            for number, step in enumerate(self._steps)
        )

    def _hold(self, name: str, value: Tensor) -> None:
        whole = value.dtype in (torch.int64, torch.int32, torch.bool) and value.numel() <= MOST_NUMBERS
        if whole or (value.numel() == 1 and value.dtype in FLOATS):
            self._numbers[name] = SizeValue(value.tolist(), value.dtype, value.clone())
            return
        attribute = re.sub(r"\W", "_", name) or "constant"
        attribute = f"c_{attribute}" if not attribute[0].isalpha() or hasattr(self, attribute) else attribute
        while hasattr(self, attribute):
            attribute += "_"
        if value.dtype in FLOATS and value.numel() > 1:
            setattr(self, attribute, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(attribute, value)
        self._constants[name] = attribute

    def forward(self, *values: Tensor) -> PyObject:
        env: dict[str, Any] = dict(zip(self._inputs, values, strict=True))
        for name, terms in self._sizes.items():
            found = [t.of(values) for t in terms] if isinstance(terms, tuple) else terms.of(values)
            env[name] = SizeValue(found)
        for step, frees in zip(self._steps, self._frees, strict=True):
            results = self._run(step, [self._value(name, env) for name in step.inputs])
            env.update(zip(step.outputs, results, strict=False))
            for name in frees:
                env.pop(name, None)
        results = [tensor(self._value(name, env)) for name in self._outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _value(self, name: str, env: Mapping[str, Any]) -> PyObject:
        if not name:
            return None
        if name in env:
            return env[name]
        if name in self._numbers:
            return self._numbers[name]
        return getattr(self, self._constants[name])

    def _run(self, step: NodeStep, inputs: Sequence[Any]) -> Sequence[Any]:
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        call = NodeCall(step.described, inputs, step.attributes, len(step.outputs), self._opset)
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
            raise Declined(
                f"the node {node.name!r} is {shown(domain, node.op_type)}, which moeopt does not read inside experts: "
                "export the model with plain operators there, or optimise the PyTorch model itself"
            )
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


def tensor_of(value: OnnxValue, where: str) -> Tensor:
    """A tensor of ``onnx_ir`` as torch's, in the same bytes where they are mapped from a file.

    Raises:
        Declined: torch has no such element type, or what it holds is not numbers.
    """
    import onnx_ir as ir

    dtype = torch_dtype(value.dtype, f"the tensor {value.name or where!r}")
    array = value.numpy()
    if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        array = array.astype("int8" if value.dtype == ir.DataType.INT4 else "uint8")
        return torch.from_numpy(array)
    if dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        array = array.view("int16" if dtype == torch.bfloat16 else "uint8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mapped bytes are read-only, and nothing writes to a constant
        found = torch.from_numpy(array)
    return found if found.dtype == dtype else found.view(dtype)


__all__ = ["GraphValue", "InterpretedGraph", "NodeStep", "steps_of", "tensor_of"]

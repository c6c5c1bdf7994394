"""Nodes that make floats of codes, read as constants where their codes are constants; others are declined by name.

A file whose weights alone are codes computes what one with the dequantised floats does. A file that rounds activations
too (``QuantizeLinear`` on them, ``MatMulInteger``, accuracy level 4) computes another function with each input, which
no form of the experts here does: its node is named in the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.coded import CodedTensor, coded, unpacked
from moeopt.onnx_in.constants import MOST_NODES, QUANTISE, ConstantReader, given
from moeopt.onnx_in.dtypes import FLOATS, torch_dtype
from moeopt.onnx_in.free_names import FreeNames
from moeopt.onnx_in.operators.table import CONTRIB, operator_of, shown
from moeopt.onnx_in.program import NodeStep
from moeopt.value_types import OnnxNode, OnnxValue

DEQUANTISE, NBITS = "DequantizeLinear", "MatMulNBits"
ON_ACTIVATIONS = frozenset(
    (QUANTISE, "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv", "QGemm")
    + ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearSigmoid", "QLinearMul", "QLinearAdd")
)
"""Operators that round activations to whole numbers, or compute with such."""
QUANTISED = ON_ACTIVATIONS | {DEQUANTISE, NBITS, "MatMulBnb4", "MatMulFpQ4", "DequantizeBFP", "GatherBlockQuantized"}
"""Operators that make floats of a quantised model's codes, or compute with codes."""
INSTEAD = "optimise the file from before it was quantised, or the PyTorch model with quantize='int8' or 'int4'"
_DAMAGED = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError, OverflowError)
"""What torch, onnx_ir and Python raise on sizes, types and attributes that do not go together."""
_KINDS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int32": 32, "int16": 16, "uint16": 16, "float8e4m3fn": 8}


def named(node: OnnxNode) -> str:
    """A node for messages."""
    return f"the node {node.name!r} is {shown(*operator_of(node))}"


def is_quantised(node: OnnxNode) -> bool:
    """Whether a node is one of :data:`QUANTISED`, and none of a stranger's domain that is only called so."""
    return node.op_type in QUANTISED and operator_of(node)[0] in ("", CONTRIB)


def damaged(node: OnnxNode, what: str) -> Declined:
    """What is raised on a node whose parts contradict each other."""
    return Declined(f"{named(node)} with {what}, which do not go together: the file was damaged or edited")


def unread_codes(node: OnnxNode) -> str:
    """The reason for an operator of :data:`QUANTISED` that is not read: what it does, and the way out."""
    if node.op_type in ON_ACTIVATIONS:
        return (
            f"{named(node)}: the block is quantised, and so are its activations, which are rounded to whole numbers at "
            "each call; moeopt reads experts whose weights alone are codes (DequantizeLinear on weights, MatMulNBits), "
            f"for no form of experts here rounds as this file does; {INSTEAD}"
        )
    return f"{named(node)}: the block is quantised in a form of codes that moeopt does not read; {INSTEAD}"


class CodedConstants:
    """The constants of codes among the nodes of a region or a file; each is read once.

    Args:
        opset: the version of ONNX's own operators.
        nodes: all of the graph, whose names are taken.

    Attributes:
        found: what was read, by the name of the value that has the floats.
        codes: constants that the file itself rounds, where more than a ``DequantizeLinear`` reads these, by name.
    """

    def __init__(self, opset: int, nodes: Iterable[OnnxNode] = ()) -> None:
        self.opset, self._constants = opset, ConstantReader(opset)
        self._names = FreeNames(v.name for n in nodes for v in (*n.inputs, *n.outputs) if v is not None)
        self._steps: dict[int, list[NodeStep]] = {}
        self.found: dict[str, CodedTensor] = {}
        self.codes: dict[str, Tensor] = {}

    def read(self, node: OnnxNode) -> list[NodeStep]:
        """What a node of :data:`QUANTISED` becomes beside a constant: no step, or a product with that constant.

        Raises:
            Declined: its codes are no constants, of a form that is not read, or contradict its other parts.
        """
        if id(node) not in self._steps:
            try:
                self._steps[id(node)] = self._read(node)
            except _DAMAGED as err:
                said = next(iter(str(err).splitlines()), "")[:200]
                raise damaged(node, f"codes, scales and attributes ({type(err).__name__}: {said})") from None
        return self._steps[id(node)]

    def _read(self, node: OnnxNode) -> list[NodeStep]:
        if node.op_type == QUANTISE and self._constants.is_constant(node.outputs[0]):
            made = node.outputs[0]
            if made.is_graph_output() or any(user.op_type != DEQUANTISE for user, _ in made.uses()):
                self.codes[made.name] = self._constants.read(made)
            return []  # a node that makes floats of the codes reads these through it
        if node.op_type == DEQUANTISE:
            return self._dequantise(node)
        if (node.domain, node.op_type) == (CONTRIB, NBITS):
            return self._product(node)
        raise Declined(unread_codes(node))

    def _dequantise(self, node: OnnxNode) -> list[NodeStep]:
        source, factor = given(node, 0), given(node, 1)
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if not all(v is None or self._constants.is_constant(v) for v in node.inputs):
            producer = source.producer()
            if producer is not None and producer.op_type in ON_ACTIVATIONS:
                raise Declined(unread_codes(producer))
            raise Declined(
                f"{named(node)} on codes that are no constant, like those of experts that data pick, or that over "
                f"{MOST_NODES} nodes compute; moeopt reads codes that are constants: dequantise the weights before "
                f"they are picked, or {INSTEAD}"
            )
        kind = self._constants.kind(source)
        if kind not in _KINDS:
            raise Declined(f"{named(node)} of {kind}, codes that moeopt does not read; {INSTEAD}")
        if zero is not None and self._constants.kind(zero) != kind:
            raise damaged(node, f"codes of {kind} and zero points of {self._constants.kind(zero)}")
        scales = self._constants.read(factor)
        zeros = self._constants.read(zero) if zero is not None else None
        shape = self._constants.shape(source)
        block, whole = _block(node, shape, tuple(scales.shape))
        scales = scales.reshape(whole)
        if zeros is not None:
            if zeros.numel() != scales.numel():
                raise damaged(node, f"{zeros.numel()} zero points and {scales.numel()} scales")
            zeros = zeros.reshape(whole) if bool((zeros.to(torch.float32) != 0).any()) else None
        dtype = _dtype_of(node, scales)
        name = node.outputs[0].name
        self.found[name] = coded(
            node.name or "", lambda: self._constants.read(source), _KINDS[kind], scales, zeros, block, dtype
        )
        return []

    def _product(self, node: OnnxNode) -> list[NodeStep]:
        at = {name: a.value for name, a in node.attributes.items()}
        K, N, bits, size = (int(at.get(k, d)) for k, d in (("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)))
        zeros, order, bias = [*node.inputs, *[None] * 6][3:6]
        a, blob, scales = (given(node, n) for n in range(3))
        if order is not None:
            raise Declined(
                f"{named(node)} with g_idx: its weights share scales in an order of their own, and moeopt reads blocks "
                f"that lie side by side; quantise without act order (desc_act), or {INSTEAD}"
            )
        if int(at.get("accuracy_level", 0)) == 4:
            raise Declined(
                f"{named(node)} at accuracy_level 4: ONNX Runtime rounds the rows that it multiplies to int8 there, "
                "as large an error as that of the codes, and another function than one on the weights' floats; "
                "quantise with accuracy_level 0 or 1 (or set the attribute so), or optimise the PyTorch model with "
                "quantize='int4'"
            )
        if bits not in (2, 4, 8) or size < 16 or size & (size - 1) or min(K, N) < 1:
            raise Declined(
                f"{named(node)} with {bits} bits in blocks of {size} for K={K} and N={N}, which moeopt does not read; "
                f"{INSTEAD}"
            )
        if not all(v is None or self._constants.is_constant(v) for v in (blob, scales, zeros)):
            raise Declined(f"{named(node)} on codes that are no constant; moeopt reads codes that are; {INSTEAD}")
        blocks = -(-K // size)
        kind, shape = self._constants.kind(blob), self._constants.shape(blob)
        if kind != "uint8" or math.prod(shape) != N * blocks * size * bits // 8:
            raise damaged(node, f"K={K}, N={N}, {bits} bits in blocks of {size}, and codes of {kind} {list(shape)}")
        held = self._constants.read(scales)
        if held.numel() != N * blocks:
            raise damaged(node, f"K={K}, N={N}, blocks of {size}, and scales of {list(held.shape)}")
        held = held.reshape(N, blocks)
        if held.dtype not in FLOATS:
            raise Declined(f"{named(node)} with scales of {held.dtype}, which moeopt does not read; {INSTEAD}")
        zero = self._zeros(node, zeros, (N, blocks), bits)

        def codes() -> Tensor:
            return unpacked(self._constants.read(blob).reshape(N, -1), bits, K)

        weight = self._names.new(f"{node.outputs[0].name}.floats")
        self.found[weight] = coded(node.name or "", codes, bits, held, zero, (1, size), held.dtype)
        return self._product_steps(node, a, weight, bias)

    def _product_steps(self, node: OnnxNode, rows: OnnxValue, weight: str, bias: OnnxValue) -> list[NodeStep]:
        """``rows @ weight.T`` (+ ``bias``), as the node's result."""
        made, name = node.outputs[0].name, node.name or ""
        inner = made if bias is None else self._names.new(f"{made}.product")
        steps = [NodeStep(CONTRIB, "FusedMatMul", name, (rows.name, weight), (inner,), {"transB": 1})]
        return steps if bias is None else [*steps, NodeStep("", "Add", name, (inner, bias.name), (made,))]

    def _zeros(self, node: OnnxNode, zeros: OnnxValue, shape: tuple[int, int], bits: int) -> Tensor:
        if zeros is None:
            return torch.full(shape, 1 << (bits - 1), dtype=torch.uint8)
        held = self._constants.read(zeros)
        if held.dtype != torch.uint8:
            raise Declined(
                f"{named(node)} with zero points of {held.dtype}: moeopt reads those that are codes themselves; "
                f"{INSTEAD}"
            )
        if held.numel() != shape[0] * -(-shape[1] * bits // 8):
            raise damaged(node, f"zero points of {list(held.shape)} for {shape[0]} rows of {shape[1]} blocks")
        return unpacked(held.reshape(shape[0], -1), bits, shape[1])


def _block(node: OnnxNode, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many elements of each axis share a scale of a ``DequantizeLinear``, and the shape of its scales by axis."""
    at: Mapping[str, Any] = {name: a.value for name, a in node.attributes.items()}
    size, axis = int(at.get("block_size", 0)), int(at.get("axis", 1))
    whole = tuple(max(n, 1) for n in shape)
    if math.prod(scales) == 1 and not size:
        return whole, (1,) * len(shape)
    axis = axis % len(shape) if -len(shape) <= axis < len(shape) else len(shape)
    if axis < len(shape) and not size and scales == shape[axis : axis + 1]:
        return (
            tuple([1 if d == axis else n for d, n in enumerate(whole)]),
            tuple([n if d == axis else 1 for d, n in enumerate(shape)]),
        )
    wanted = tuple([-(-n // size) if d == axis else n for d, n in enumerate(shape)]) if size else ()
    if size and axis < len(shape) and scales == wanted:
        return tuple([size if d == axis else 1 for d in range(len(shape))]), scales
    raise damaged(
        node,
        f"scales of the shape {list(scales)} for codes of {list(shape)} (axis {at.get('axis', 1)}, blocks of {size})",
    )


def _dtype_of(node: OnnxNode, scales: Tensor) -> torch.dtype:
    """The dtype of the floats."""
    asked = node.attributes.get("output_dtype")
    dtype = torch_dtype(asked.as_int(), named(node)) if asked is not None and asked.as_int() else scales.dtype
    if dtype not in FLOATS or scales.dtype not in FLOATS:
        raise Declined(f"{named(node)} with scales of {scales.dtype}, which moeopt does not read; {INSTEAD}")
    return dtype

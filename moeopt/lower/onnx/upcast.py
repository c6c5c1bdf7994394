"""16-bit floats on a provider that computes in float32: the graph is widened, its ends stay 16-bit.

ONNX Runtime's CPU has no bfloat16 MatMul, and runs float16 ops between casts. Widening every float16 or
bfloat16 value to float32 keeps each weight's value exactly and rounds less at every step; inputs and
outputs keep their dtype through one Cast each. Roundings that decide stay (``moeopt.lower.onnx.kept_roundings``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.kept_roundings import SMALL, kept_roundings, round_again
from moeopt.lower.onnx.lowerings.row_graph import widened
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue

BEYOND_FLOAT16 = (
    "float16 is computed as float32 by ONNX Runtime on a CPU: what exceeds 65504 is infinite in the model, and stays "
    "finite in the engine"
)
"""A note on engines with float16 weights."""

_FLOAT16 = re.compile(r"\bfloat16\b")
NARROW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class UpcastExpertWeights:
    """A bank whose tensors are handed out in float32, each converted when it is read."""

    def __init__(self, bank: ExpertWeights) -> None:
        self._bank = bank
        self.num_experts = bank.num_experts

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        return tuple([t.float() for t in self._bank.w_in(e)])

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        return tuple([None if t is None else t.float() for t in self._bank.b_in(e)])

    def w_out(self, e: int) -> Tensor:
        return self._bank.w_out(e).float()

    def b_out(self, e: int) -> Tensor | None:
        found = self._bank.b_out(e)
        return None if found is None else found.float()

    def norm(self, e: int) -> Tensor | None:
        found = self._bank.norm(e)
        return None if found is None else found.float()

    def stacked(self) -> StackedExpertWeights | None:
        return None


def upcast_node(site: ExpertsNode) -> ExpertsNode:
    """``site`` with every 16-bit dtype as float32; itself when it has none."""
    spec = site.spec
    if isinstance(spec, RowFunction):
        return widened(site)
    fields = ("compute_dtype", "act_dtype", "accum_dtype", "out_dtype")
    narrow: dict[str, Any] = {f: "float32" for f in fields if getattr(spec, f) in NARROW.values()}
    bank_dtype = site.bank.dtype if isinstance(site.bank, QuantizedExpertWeights) else site.bank.w_out(0).dtype
    if not narrow and site.dtype not in NARROW and site.weights_dtype not in NARROW and bank_dtype not in NARROW:
        return site
    wide = {d: torch.float32 for d in NARROW}
    return dataclasses.replace(
        site,
        bank=UpcastExpertWeights(site.bank) if bank_dtype in NARROW else site.bank,
        spec=dataclasses.replace(spec, **narrow),
        dtype=wide.get(site.dtype, site.dtype),
        weights_dtype=wide.get(site.weights_dtype, site.weights_dtype),
    )


def upcast_and_tell(model: OnnxModel, sites: Iterable[ExpertsNode], remarks: list[str]) -> None:
    """:func:`upcast_graph` of a graph with these experts; ``BEYOND_FLOAT16`` joins ``remarks`` where it has float16.

    Roundings that stay (``kept_roundings``) overflow as they did; bfloat16 has float32's range.
    """
    import onnx_ir as ir

    weights = model.graph.initializers.values()
    widened_here = any(v.dtype == ir.DataType.FLOAT16 and v.const_value.size > SMALL for v in weights)
    asked_for = any(site.dtype == torch.float16 or _FLOAT16.search(site.spec.encode()) for site in sites)
    if (widened_here or asked_for) and BEYOND_FLOAT16 not in remarks:
        remarks.append(BEYOND_FLOAT16)
    upcast_graph(model)


def upcast_graph(model: OnnxModel) -> bool:
    """Widen an ``onnx_ir.Model`` in place; returns whether anything was narrow. Raises nothing."""
    import onnx_ir as ir

    narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    graph = model.graph
    ends = {id(v): v.dtype for v in (*graph.inputs, *graph.outputs) if v.dtype in narrow}
    touched, rounded = bool(ends), kept_roundings(model)
    for node in graph.all_nodes():
        touched |= _widen_attributes(node, narrow)
        inner = [
            value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH for value in a.value.inputs
        ]
        for value in (*node.outputs, *inner):
            if value.dtype in narrow:
                value.type, touched = ir.TensorType(ir.DataType.FLOAT), True
    for value in graph.initializers.values():
        if value.dtype in narrow:
            value.const_value = _wide_tensor(value.const_value)
            value.type, touched = ir.TensorType(ir.DataType.FLOAT), True
    for value in list(graph.inputs):
        if id(value) in ends:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
    for number, value in enumerate(graph.outputs):
        if id(value) in ends:
            cast = ir.node("Cast", [value], {"to": ends[id(value)]})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ends[id(value)]), value.shape
            cast.outputs[0].name = value.name
            value.name = f"{value.name}_float32"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(cast)
            graph.outputs[number] = cast.outputs[0]
    round_again(rounded)
    return touched


def _widen_attributes(node: OnnxNode, narrow: set[Any]) -> bool:
    import onnx_ir as ir

    touched = False
    for name, attribute in list(node.attributes.items()):
        if (
            attribute.type == ir.AttributeType.INT
            and name in ("to", "dtype")
            and attribute.value in set(map(int, narrow))
        ):
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            touched = True
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in narrow:
            node.attributes[name] = ir.AttrTensor(name, _wide_tensor(attribute.value))
            touched = True
    return touched


def _wide_tensor(tensor: OnnxValue) -> OnnxValue:
    import numpy as np
    import onnx_ir as ir

    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=tensor.shape,
        name=tensor.name,
    )

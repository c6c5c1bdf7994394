"""Put a lowering in the place of each ``moeopt::Experts`` node of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from moeopt.errors import NotSaveableError
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import DOMAIN, OP, ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.named_ids import always_named
from moeopt.value_types import OnnxModel, OnnxValue, PyObject


def replace_sites(
    model: OnnxModel, sites: Sequence[ExpertsNode], choose: Callable[[ExpertsNode], Lowering]
) -> list[str]:
    """Lower every site of an ``onnx_ir.Model`` in place; returns the name of each site's lowering.

    A site that stands in the graph twice (prefill and decode in one) is lowered at each place; weights are
    named after the site, so equal ones are one initializer only where a lowering says so.
    """
    import onnx_ir as ir

    chosen = [choose(site) for site in sites]
    seen: set[int] = set()
    for node in [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, OP)]:
        number = node.attributes["site"].as_int()
        if number in seen:
            raise NotSaveableError(f"{sites[number].name} stands twice in one graph")
        seen.add(number)
        site = sites[number]
        if site.spec.out_of_range != "identity" and always_named(node.inputs[1], site.bank.num_experts):
            site = dataclasses.replace(site, named=True)
        builder = Builder(site.name)
        y = chosen[number].emit(builder, site, *node.inputs)
        old = node.outputs[0]
        y.type, y.shape = old.type, old.shape
        model.graph.insert_before(node, builder.nodes)
        for value in builder.initializers:
            model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        model.graph.opset_imports.update(builder.domains)
    model.graph.opset_imports.pop(DOMAIN, None)
    return [lowering.name for lowering in chosen]


def one_op(site: ExpertsNode, lowering: Lowering) -> OnnxValue:
    """A model of one site alone: inputs ``x`` (T, H), ``ids`` (T, K), ``weights`` (T, K), output ``y`` (T, H_out)."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import from_torch_dtype

    x = _input(ir, "x", from_torch_dtype(site.dtype), ["T", site.features])
    ids = _input(ir, "ids", ir.DataType.INT64, ["T", site.top_k])
    weights = _input(ir, "weights", from_torch_dtype(site.weights_dtype), ["T", site.top_k])
    builder = Builder(site.name)
    y = lowering.emit(builder, site, x, ids, weights)
    y.name = "y"
    y.type = ir.TensorType(from_torch_dtype(out_dtype(site)))
    graph = ir.Graph(
        [x, ids, weights],
        [y],
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": 20, **builder.domains},
        name=site.name,
    )
    return ir.Model(graph, ir_version=10, producer_name="moeopt")


def out_dtype(site: ExpertsNode) -> OnnxValue:
    """The torch dtype of a site's result."""
    import torch

    return getattr(torch, site.spec.out_dtype) if site.spec.out_dtype else site.dtype


def _input(ir: OnnxValue, name: str, dtype: PyObject, shape: list[Any]) -> OnnxValue:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

"""The elementwise parts of an expert as nodes: clamp, activate, multiply, norm; rounding where PyTorch rounds.

The definitions are :func:`moeopt.ops.activations.apply_gate` and :func:`moeopt.ops.reference.rms_norm`.
What PyTorch does in one kernel in float32 inside, for float16 and bfloat16, is done in float32 here too.
"""

from __future__ import annotations

import torch

from moeopt.ir.activations import activation_of
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of, wide
from moeopt.value_types import OnnxAttribute, OnnxValue


def gate(graph: Builder, site: ExpertsNode, h: OnnxValue, columns: int) -> OnnxValue:
    """``apply_gate`` of ``h`` (..., O), gate columns then up columns, in the compute dtype; returns (..., I)."""
    spec, types = site.spec, types_of(site)
    h = cast(graph, h, types.compute, types.act)
    if spec.gated:
        half = graph.const([columns // 2, columns // 2], "int64")
        g, u = graph.op("Split", [h, half], outputs=2, axis=-1, name="gate_and_up")
    else:
        g, u = h, None
    g = _clamp(graph, g, spec.gate_min, spec.gate_max, types.act)
    a = activation(graph, g, spec.activation, spec.alpha, types.act)
    a = _clamp(graph, a, spec.act_min, spec.act_max, types.act)
    if u is not None:
        u = _clamp(graph, u, spec.up_min, spec.up_max, types.act)
        if spec.up_offset:
            u = graph.op("Add", [u, scalar(graph, spec.up_offset, types.act)])
        a = graph.op("Mul", [a, u])
    return cast(graph, a, types.act, types.compute)


def activation(graph: Builder, g: OnnxValue, name: str, alpha: float | None, dtype: torch.dtype) -> OnnxValue:
    """``name`` of ``moeopt.ir.activations.ACTIVATION_TABLE`` on ``g``, in ``dtype``."""
    entry = activation_of(name)
    inner = wide(dtype) if entry.one_kernel else dtype

    def op(op_type: str, *values: OnnxValue, **attributes: OnnxAttribute) -> OnnxValue:
        return graph.op(op_type, values, **attributes)

    def const(value: float) -> OnnxValue:
        return scalar(graph, value, inner)

    value = entry.onnx(op, const, cast(graph, g, dtype, inner), *entry.parameters(alpha))
    return cast(graph, value, inner, dtype)


def rms_norm(graph: Builder, site: ExpertsNode, o: OnnxValue, weight: OnnxValue, *, axis: int) -> OnnxValue:
    """RMSNorm over the last dimension of ``o``, which is ``axis``: over no rows, ONNX Runtime ignores an axis of -1.

    ``weight`` broadcasts against ``o`` and is in ``wide(compute)``; None means no weight.
    """
    compute = types_of(site).compute
    inner = wide(compute)
    assert site.spec.out_norm_eps is not None
    o = cast(graph, o, compute, inner)
    mean = graph.op("ReduceMean", [graph.op("Mul", [o, o]), graph.const([axis], "int64")], keepdims=1)
    root = graph.op("Sqrt", [graph.op("Add", [mean, scalar(graph, site.spec.out_norm_eps, inner)])])
    o = graph.op("Mul", [o, graph.op("Reciprocal", [root])])
    if weight is not None:
        o = graph.op("Mul", [o, weight])
    return cast(graph, o, inner, compute)


def _clamp(graph: Builder, value: OnnxValue, low: float | None, high: float | None, dtype: torch.dtype) -> OnnxValue:
    if low is None and high is None:
        return value
    limits = [None if limit is None else scalar(graph, limit, dtype) for limit in (low, high)]
    if None in limits and dtype != torch.bfloat16:  # Clip takes infinity for the largest number then
        bound = limits[low is None]
        return graph.op("Min" if low is None else "Max", [value, bound])
    return graph.op("Clip", [value, *(limits if high is not None else limits[:1])])

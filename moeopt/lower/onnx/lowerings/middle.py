"""The elementwise parts of an expert as nodes: clamp, activate, multiply, norm; rounding where PyTorch rounds.

The definitions are :func:`moeopt.ops.activations.apply_gate` and :func:`moeopt.ops.reference.rms_norm`.
What PyTorch does in one kernel in float32 inside, for float16 and bfloat16, is done in float32 here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import stable
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of, wide

_ONE_KERNEL = ("silu", "gelu", "gelu_tanh", "mish", "softplus", "elu", "leaky_relu")


def gate(graph: Builder, site: ExpertsNode, h: Any, columns: int) -> Any:
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


def activation(graph: Builder, g: Any, name: str, alpha: float | None, dtype: torch.dtype) -> Any:
    """``name`` of ``moeopt.ir.specs.ACTIVATIONS`` on ``g``, in ``dtype``."""
    inner = wide(dtype) if name in _ONE_KERNEL else dtype
    value = _activation(graph, cast(graph, g, dtype, inner), name, alpha, inner)
    return cast(graph, value, inner, dtype)


def rms_norm(graph: Builder, site: ExpertsNode, o: Any, weight: Any, *, axis: int) -> Any:
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


def _clamp(graph: Builder, value: Any, low: float | None, high: float | None, dtype: torch.dtype) -> Any:
    if low is None and high is None:
        return value
    limits = [None if limit is None else scalar(graph, limit, dtype) for limit in (low, high)]
    if None in limits and dtype != torch.bfloat16:  # Clip takes infinity for the largest number then
        bound = limits[low is None]
        return graph.op("Min" if low is None else "Max", [value, bound])
    return graph.op("Clip", [value, *(limits if high is not None else limits[:1])])


def _activation(graph: Builder, g: Any, name: str, alpha: float | None, dtype: torch.dtype) -> Any:
    def const(value: float) -> Any:
        return scalar(graph, value, dtype)

    def mul(a: Any, b: Any) -> Any:
        return graph.op("Mul", [a, b])

    def op(op_type: str, *values: Any) -> Any:
        return graph.op(op_type, values)

    if name == "identity":
        return g
    if name in ("silu", "swish"):
        inner = g if name == "silu" else mul(g, const(_required(alpha)))
        return op("Div", g, stable.one_plus_exp_of_minus(op, const, inner))
    if name == "sigmoid":
        return stable.sigmoid(op, const, g)
    if name == "gelu":
        one_plus = graph.op("Add", [graph.op("Erf", [graph.op("Div", [g, const(math.sqrt(2))])]), const(1)])
        return mul(mul(g, one_plus), const(0.5))
    if name == "gelu_tanh":
        cube = mul(mul(mul(g, g), g), const(0.044715))
        inner = mul(graph.op("Add", [g, cube]), const(math.sqrt(2 / math.pi)))
        return mul(mul(g, const(0.5)), graph.op("Add", [graph.op("Tanh", [inner]), const(1)]))
    if name in ("relu", "tanh"):
        return graph.op(name.capitalize(), [g])
    if name == "relu2":
        r = graph.op("Relu", [g])
        return mul(r, r)
    if name == "softcap":
        return mul(graph.op("Tanh", [graph.op("Div", [g, const(_required(alpha))])]), const(_required(alpha)))
    if name == "softplus":
        linear = graph.op("Greater", [g, const(20)])  # F.softplus's threshold
        return graph.op("Where", [linear, g, stable.softplus(op, const, g)])
    if name == "mish":
        return stable.mish(op, const, g)
    if name == "elu":
        return stable.elu(op, const, g, _required(alpha))
    assert name == "leaky_relu", name
    return graph.op("Where", [graph.op("Greater", [g, const(0)]), g, mul(g, const(_required(alpha)))])


def _required(alpha: float | None) -> float:
    assert alpha is not None, "ExpertsSpec checks that alpha is given"
    return alpha

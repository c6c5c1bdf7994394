"""Quantised experts as nodes: codes and scales are what a graph stores, and floats are made of them in the graph.

    w (N, K) = (value(code) - zero) * scale            value: a cast, or a look-up of each half of a byte in a table

Everything on the right is constant, so ONNX Runtime computes w once when a session loads: the file holds codes, the
session floats. A scale of 16 bits is stored as it is and widened. Shape legend: E experts, N out, K in; a block of
scales is h rows by c columns, R of them down and C across.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import NIBBLES, WeightFormat
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.activations import split_rows
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.value_types import OnnxValue


def is_quantized(site: ExpertsNode) -> bool:
    """Whether the experts of ``site`` are codes."""
    return isinstance(site.bank, QuantizedExpertWeights)


def row_order(spec: ExpertsSpec, rows: int) -> Tensor | None:
    """The rows of a packed W_in in the order gate, then up; None where they lie so."""
    if not spec.gated or spec.rows in ("separate", "gate|up"):
        return None
    gate, up = split_rows(torch.arange(rows)[None], spec)
    return torch.cat([gate[0], up[0]])


def matrices(site: ExpertsNode, e: int, which: str) -> list[QuantizedWeight]:
    """The codes of expert ``e``'s ``"gate_up"`` (one matrix, or gate and up) or ``"down"``."""
    bank: QuantizedExpertWeights = site.bank
    return [m[e] for m in bank.w_in_q] if which == "gate_up" else [bank.w_out_q[e]]


def float_weight(graph: Builder, site: ExpertsNode, e: int, which: str, dtype: torch.dtype) -> OnnxValue:
    """One expert's ``"gate_up"`` (H, O) or ``"down"`` (I, D) weight in ``dtype``, made of its codes in the graph."""
    parts = matrices(site, e, which)
    values = [dequantized(graph, one, f"expert.{e}/{which}" + (f".{n}" if n else "")) for n, one in enumerate(parts)]
    w_NK = values[0] if len(values) == 1 else graph.op("Concat", values, axis=0)
    order = row_order(site.spec, parts[0].shape[0]) if which == "gate_up" else None
    if order is not None:
        w_NK = graph.op("Gather", [w_NK, graph.const(order.tolist(), "int64")], axis=0)
    w_KN = graph.op("Transpose", [w_NK], perm=[1, 0], name=f"expert.{e}/{which}.weight")
    return w_KN if dtype == torch.float32 else _cast(graph, w_KN, dtype)


def dequantized(graph: Builder, weight: QuantizedWeight, name: str) -> OnnxValue:
    """The (N, K) float32 weight that codes stand for."""
    format, (N, K) = weight.format, weight.shape
    codes = graph.weight(f"{name}.codes", lambda: weight.codes, format.code_dtype, tuple(weight.codes.shape))
    value = _halves(graph, codes, format, weight.shape) if format.packed else _cast(graph, codes, torch.float32)
    if weight.scales is None:
        return value
    if (held := weight.zeros) is not None:
        zeros = graph.weight(f"{name}.zeros", functools.partial(_same, held), format.code_dtype, tuple(held.shape))
        value = graph.op("Sub", [value, _spread(graph, _cast(graph, zeros, torch.float32), format, (N, K))])
    elif format.zero:
        value = graph.op("Sub", [value, graph.const(float(format.zero), "float32")])
    return graph.op("Mul", [value, _spread(graph, scales_of(graph, weight, name), format, (N, K))], name=name)


def scales_of(graph: Builder, weight: QuantizedWeight, name: str) -> OnnxValue:
    """The scales (R, C) in float32, stored in their own dtype."""
    held = weight.scales
    assert held is not None
    scales = graph.weight(
        f"{name}.scales", functools.partial(_same, held), weight.format.scale_dtype, tuple(held.shape)
    )
    if weight.format.scale != "e8m0":
        return _cast(graph, scales, torch.float32)
    powers = [2.0 ** (s - 127) for s in range(255)] + [float("nan")]
    index = graph.op("Cast", [scales], to=_onnx(torch.int32))
    return graph.op("Gather", [graph.const(powers, "float32", name="powers"), index], axis=0)


def _halves(graph: Builder, codes: OnnxValue, format: WeightFormat, shape: tuple[int, int]) -> OnnxValue:
    """What the two codes of each byte mean, one after the other, cut to K columns."""
    N, K = shape
    low = graph.op("BitwiseAnd", [codes, graph.const(15, "uint8")])
    high = graph.op("BitShift", [codes, graph.const(4, "uint8")], direction="RIGHT")
    pair = (low, high) if format.packing == "low nibble first" else (high, low)
    last = graph.const([-1], "int64")
    both = graph.op("Concat", [graph.op("Unsqueeze", [half, last]) for half in pair], axis=-1)
    flat = graph.op("Reshape", [both, graph.const([N, 2 * (-(-K // 2))], "int64")])
    if K % 2:
        flat = graph.op("Slice", [flat, *(graph.const([n], "int64") for n in (0, K, 1))])
    index = graph.op("Cast", [flat], to=_onnx(torch.int32))
    return graph.op("Gather", [graph.const(NIBBLES[format.codes], "float32", name="values"), index], axis=0)


def _spread(graph: Builder, scales: OnnxValue, format: WeightFormat, shape: tuple[int, int]) -> OnnxValue:
    """Scales (R, C) as (N, K), or as what broadcasts to that."""
    (N, K), (R, C) = shape, format.scale_shape(shape)
    h, c = format.block[0] or N, format.block[1] or K
    if R in (1, N) and C == 1 and (R == 1 or h == 1):
        return scales
    split = graph.op("Reshape", [scales, graph.const([R, 1, C, 1], "int64")])
    wide = graph.op("Expand", [split, graph.const([R, h, C, c], "int64")])
    whole = graph.op("Reshape", [wide, graph.const([R * h, C * c], "int64")])
    if (R * h, C * c) == shape:
        return whole
    return graph.op("Slice", [whole, *(graph.const(n, "int64") for n in ([0, 0], [N, K], [0, 1]))])


def _same(held: Tensor) -> Tensor:
    return held


def _cast(graph: Builder, value: OnnxValue, dtype: torch.dtype) -> OnnxValue:
    return graph.op("Cast", [value], to=_onnx(dtype)) if value.dtype != _onnx(dtype) else value


def _onnx(dtype: torch.dtype) -> int:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return int(from_torch_dtype(dtype))

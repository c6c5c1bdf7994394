"""An expert's weights in one canonical form, whatever the bank's: (in, out), gate columns then up columns.

A constant B of ``MatMul`` that lies so is packed once when the session loads. Shape legend: E experts,
O columns (2I gated, I plain), H hidden, I intermediate, D = W_out's output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.ops.activations import split_rows
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.value_types import OnnxValue


@dataclass(frozen=True)
class ExpertSizes:
    """E experts, H input width, I intermediate, O columns of the first matmul, D output width."""

    E: int
    H: int
    I: int
    O: int
    D: int


def sizes_of(site: ExpertsNode) -> ExpertSizes:
    """The sizes of ``site``'s experts, read from expert 0; see :func:`refuses_sizes`."""
    return _sizes(site, 0)


def refuses_sizes(site: ExpertsNode) -> str:
    """Why the experts cannot share one set of activations: they differ in size. "" when they don't."""
    first = _sizes(site, 0)
    for e in range(1, first.E):
        if _sizes(site, e) != first:
            return f"expert {e} differs in size from expert 0; keep this block in PyTorch"
    return ""


def w_in_HO(bank: ExpertWeights, e: int, spec: ExpertsSpec) -> Tensor:
    """W_in of expert ``e`` as (H, O): gate columns, then up columns."""
    oh = [w if spec.w_in_layout == "oi" else w.t() for w in bank.w_in(e)]
    return _gate_then_up([w.t() for w in oh], spec)


def b_in_O(bank: ExpertWeights, e: int, spec: ExpertsSpec, width: int, dtype: torch.dtype) -> Tensor:
    """b_in of expert ``e`` in the same column order; zeros where a bias is missing."""
    parts = bank.b_in(e)
    each = width // len(parts)
    return _gate_then_up([_or_zeros(b, each, dtype) for b in parts], spec)


def w_out_ID(bank: ExpertWeights, e: int, spec: ExpertsSpec) -> Tensor:
    """W_out of expert ``e`` as (I, D)."""
    return bank.w_out(e).t() if spec.w_out_layout == "oi" else bank.w_out(e)


def has_b_in(bank: ExpertWeights) -> bool:
    """True when some expert has an input bias."""
    return any(b is not None for e in range(bank.num_experts) for b in bank.b_in(e))


def has_b_out(bank: ExpertWeights) -> bool:
    """True when some expert has an output bias."""
    return any(bank.b_out(e) is not None for e in range(bank.num_experts))


def expert_weight(graph: Builder, site: ExpertsNode, e: int, which: str) -> OnnxValue:
    """A graph value for one expert's ``"gate_up"`` (H, O) or ``"down"`` (I, D) weight, in the compute dtype."""
    size, compute = sizes_of(site), types_of(site).compute
    read = w_in_HO if which == "gate_up" else w_out_ID
    shape = (size.H, size.O) if which == "gate_up" else (size.I, size.D)
    name = f"expert.{e}/{which}.weight"
    return graph.weight(name, lambda: read(site.bank, e, site.spec).to(compute), compute, shape)


def b_in_table(graph: Builder, site: ExpertsNode) -> OnnxValue:
    """The input biases as one value (E + 1, O), the last row zero; None when no expert has one."""
    if not has_b_in(site.bank):
        return None
    size, compute = sizes_of(site), types_of(site).compute

    def read() -> Tensor:
        rows = [b_in_O(site.bank, e, site.spec, size.O, compute) for e in range(size.E)]
        return torch.stack([*[row.to(compute).cpu() for row in rows], torch.zeros(size.O, dtype=compute)])

    return graph.weight("gate_up.bias", read, compute, (size.E + 1, size.O))


def b_out_table(graph: Builder, site: ExpertsNode) -> OnnxValue:
    """The output biases (E + 1, D), the last row zero; None when no expert has one."""
    if not has_b_out(site.bank):
        return None
    size, compute = sizes_of(site), types_of(site).compute

    def read() -> Tensor:
        rows = [_or_zeros(site.bank.b_out(e), size.D, compute).to(compute).cpu() for e in range(size.E)]
        return torch.stack([*rows, torch.zeros(size.D, dtype=compute)])

    return graph.weight("down.bias", read, compute, (size.E + 1, size.D))


def norm_table(graph: Builder, site: ExpertsNode, dtype: torch.dtype) -> OnnxValue:
    """The norm weights (E + 1, D) in ``dtype``, the last row one; None when no expert has one."""
    bank, size, compute = site.bank, sizes_of(site), types_of(site).compute
    if all(bank.norm(e) is None for e in range(size.E)):
        return None

    def read() -> Tensor:
        rows = [bank.norm(e) for e in range(size.E)]
        one = torch.ones(size.D, dtype=dtype)
        return torch.stack([*[one if row is None else row.detach().to(compute).to(dtype).cpu() for row in rows], one])

    return graph.weight("norm.weight", read, dtype, (size.E + 1, size.D))


def _gate_then_up(parts: list[Tensor], spec: ExpertsSpec) -> Tensor:
    if not spec.gated:
        return parts[0]
    if spec.rows != "separate":
        parts = list(split_rows(parts[0], spec))
    return torch.cat(parts, dim=-1)


def _or_zeros(b: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(width, dtype=dtype) if b is None else b.detach()


def _sizes(site: ExpertsNode, e: int) -> ExpertSizes:
    bank, spec = site.bank, site.spec
    if isinstance(bank, QuantizedExpertWeights):  # told by the format: no weight is made
        shapes = [m.shape for m in (*bank.format.w_in, bank.format.w_out)]
        columns = sum(shape[0] for shape in shapes[:-1])
        return ExpertSizes(bank.num_experts, shapes[0][1], shapes[-1][1], columns, shapes[-1][0])
    out, inner = (0, 1) if spec.w_in_layout == "oi" else (1, 0)
    parts, w_out = bank.w_in(e), bank.w_out(e)
    last, middle = (0, 1) if spec.w_out_layout == "oi" else (1, 0)
    columns = sum(w.shape[out] for w in parts)
    return ExpertSizes(bank.num_experts, parts[0].shape[inner], w_out.shape[middle], columns, w_out.shape[last])

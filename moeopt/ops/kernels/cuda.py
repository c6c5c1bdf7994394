"""The CUDA kernel: ``torch.nn.functional.grouped_mm`` where its conditions hold, else one expert at a time.

Shape legend: T tokens, E experts, K chosen per token, R = T*K rows sorted by expert, H hidden, I intermediate.

``choose_cuda_path`` is a pure function, so the choice is tested without a GPU; so is the grouped
arithmetic, which runs on any device that ``grouped_mm`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.reference import check, dtypes, experts_reference, out_features, rms_norm

Path = Literal["grouped", "loop"]
GroupedMM = Callable[..., Tensor]


def choose_cuda_path(
    capability: tuple[int, int],
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    has_grouped_mm: bool,
) -> tuple[Path, str]:
    """Which path the weights allow, and why.

    Args:
        capability: the device's compute capability.
        dtype: the compute dtype.
        shapes, strides: of each stacked (E, ., .) weight; empty when the weights are not stacked.
        has_grouped_mm: whether this torch has ``torch.nn.functional.grouped_mm``.
    """
    if not has_grouped_mm:
        return "loop", f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if not shapes:
        return "loop", "the experts are separate tensors; grouped_mm takes one stack"
    if capability < (8, 0):
        return "loop", f"grouped_mm needs compute capability 8.0; this device has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "loop", f"grouped_mm is fast in bfloat16 and float16; the compute dtype is {dtype}"
    for shape, stride in zip(shapes, strides, strict=True):
        if 1 not in stride[1:]:
            return "loop", f"a weight of shape {shape} has strides {stride}; grouped_mm needs one inner stride of 1"
        for step in (stride[0], max(stride[1:])):
            if step * dtype.itemsize % 16:
                return "loop", f"a weight of shape {shape} has strides {stride}; grouped_mm needs 16-byte steps"
    return "grouped", "stacked 16-bit weights with 16-byte strides"


def experts_cuda(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """``experts_reference``, fast; the same arguments and result, but not differentiable."""
    stacked = bank.stacked()
    weights = [] if stacked is None else [*stacked.w_in_s, stacked.w_out_s]
    compute = dtypes(x_TH, spec)[0]
    if any(w.dtype != compute or w.data_ptr() % 16 for w in weights):
        weights = []
    path, _ = choose_cuda_path(
        torch.cuda.get_device_capability(x_TH.device),
        compute,
        [tuple(w.shape) for w in weights],
        [w.stride() for w in weights],
        hasattr(F, "grouped_mm"),
    )
    if path == "loop" or stacked is None:
        return experts_reference(x_TH, ids_TK, weights_TK, bank, spec)
    return experts_grouped(x_TH, ids_TK, weights_TK, stacked, spec)


def experts_grouped(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    bank: StackedExpertWeights,
    spec: ExpertsSpec,
    grouped_mm: GroupedMM | None = None,
) -> Tensor:
    """The grouped path: no loop over experts, no synchronisation with the host.

    Rows whose id is out of range sort to the end, behind the last offset, where ``grouped_mm`` leaves
    its output unwritten; ``torch.where`` replaces them, so nothing that lies there reaches the sum.
    """
    check(x_TH, ids_TK, weights_TK, bank, spec)
    grouped_mm = grouped_mm or F.grouped_mm
    compute, accum, out = dtypes(x_TH, spec)
    (T, K), E = ids_TK.shape, bank.num_experts
    if not T * K:
        return x_TH.new_zeros(T, out_features(bank, spec), dtype=out)
    ids_R = ids_TK.reshape(-1)
    held_R = torch.where((ids_R >= 0) & (ids_R < E), ids_R, E)
    held_R, order_R = held_R.sort(stable=True)
    ends_E = torch.searchsorted(held_R, torch.arange(E, device=x_TH.device), right=True).to(torch.int32)
    inside_R1, expert_R = (held_R < E).unsqueeze(1), held_R.clamp(max=E - 1)
    x_RH = x_TH[order_R // K]
    w_R1 = weights_TK.reshape(-1)[order_R].unsqueeze(1)
    r_RH = (x_RH * w_R1 if spec.weight_on == "input" else x_RH).to(compute)

    def product(a: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
        y = grouped_mm(a, w.transpose(-2, -1) if layout == "oi" else w, offs=ends_E)
        return y if b is None else y + b.to(compute)[expert_R]

    h = tuple([product(r_RH, w, b, spec.w_in_layout) for w, b in zip(bank.w_in_s, bank.b_in_s, strict=True)])
    a_RI = torch.where(inside_R1, apply_gate(h, spec), 0)
    o_RH = product(a_RI, bank.w_out_s, bank.b_out_s, spec.w_out_layout)
    if spec.out_norm_eps is not None:
        o_RH = rms_norm(o_RH, None, spec)
        o_RH = o_RH if bank.norm_s is None else o_RH * bank.norm_s.to(compute)[expert_R]
    term_RH = (o_RH if spec.weight_on == "input" else o_RH * w_R1).to(accum)
    if spec.out_of_range == "identity":
        beyond_R1 = (ids_R[order_R] >= E).unsqueeze(1)
        term_RH = torch.where(beyond_R1, (x_RH * w_R1).to(accum), term_RH)
        inside_R1 = inside_R1 | beyond_R1
    term_RH = torch.where(inside_R1, term_RH, 0)
    where_R = torch.empty_like(order_R)
    where_R[order_R] = torch.arange(T * K, device=x_TH.device)
    where_TK = where_R.view(T, K)
    if spec.combine == "expert":
        where_TK = where_TK.sort(dim=-1).values
    y_TH = term_RH[where_TK[:, 0]]
    for k in range(1, K):
        y_TH = y_TH + term_RH[where_TK[:, k]]
    return y_TH.to(out)

"""What runs ``experts`` on CUDA: Triton's kernels, else ``grouped_mm`` where it is one launch, else a loop.

Shape legend: T tokens, E experts, K chosen per token, R = T*K rows sorted by expert, H hidden, I intermediate, D out.

``choose_cuda_path`` is a pure function, so the choice is tested without a GPU; so is the arithmetic of the grouped path
and of the loop, which run on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.kernels.counted import launches_in_words, one_launch
from moeopt.ops.native.call import transformed
from moeopt.ops.reference import check, dtypes, experts_reference, one_expert, out_features, rms_norm
from moeopt.ops.triton.addresses import weights_of
from moeopt.ops.triton.constants import function
from moeopt.ops.triton.launch import experts_triton, launches, refused
from moeopt.ops.triton.library import why_not
from moeopt.ops.triton.tiles import FEW_PAIRS, few_pairs
from moeopt.ops.unfit import Unfit

Path = Literal["triton", "grouped", "loop"]
GroupedMM = Callable[..., Tensor]

ONE_LAUNCH = ((9, 0), (10, 0))
"""Compute capabilities on which torch's ``grouped_mm`` of bfloat16 is one kernel.

Elsewhere, and in every other dtype, torch's CUDA code copies the offsets to the host and multiplies one expert after
the other (``_grouped_mm_fallback`` in aten/src/ATen/native/GroupedMMUtils.h).
"""


def choose_cuda_path(
    capability: tuple[int, int],
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    has_grouped_mm: bool,
    no_triton: str = "",
    kernels: tuple[int, int] = (2, 4),
    copied: bool = False,
    pairs: int = FEW_PAIRS,
    counted: Callable[[Path], str] = lambda path: "",
) -> tuple[Path, str]:
    """Which path this call takes, what it starts and waits for, and why no better one.

    Args:
        capability: the device's compute capability.
        dtype: the compute dtype.
        shapes, strides: of each stacked (E, ., .) weight; empty when the weights are not stacked.
        has_grouped_mm: whether this torch has ``torch.nn.functional.grouped_mm``.
        no_triton: why the Triton kernels can't take the call; "" where they can.
        kernels: how many of them there are for few pairs of token and expert, and for more.
        copied: whether the weights are copied at each call before the kernels read them.
        pairs: how many pairs are few.
        counted: the launches of the other two paths, in words with a comma behind; asked for the one that is taken.
    """
    if not no_triton:
        few, many = kernels
        return "triton", f"{few} launches for up to {pairs} pairs of token and expert, {many} for more, " + (
            "after copies of the experts' weights at each call, for which the host waits: no CUDA graph can hold them"
            if copied
            else "no wait for the host, fit for a CUDA graph"
        )
    no_grouped = _no_grouped(capability, dtype, shapes, strides, has_grouped_mm)
    if not no_grouped:
        return "grouped", f"grouped_mm, {counted('grouped')}no wait for the host; {no_triton}"
    return "loop", (
        f"a loop over the experts that are hit, which no CUDA graph can hold, {counted('loop')}with one wait for the "
        f"host: {no_triton}; {no_grouped}"
    )


def _no_grouped(
    capability: tuple[int, int],
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    has_grouped_mm: bool,
) -> str:
    """Why torch's ``grouped_mm`` can't take the weights in one launch; "" where it can."""
    if not has_grouped_mm:
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if not shapes:
        return "grouped_mm takes one stack of weights in the compute dtype, and these are separate or cast"
    if dtype != torch.bfloat16 or capability not in ONE_LAUNCH:
        return (
            "grouped_mm is one launch in bfloat16 on compute capability 9.0 and 10.0 only; this is "
            f"{str(dtype).removeprefix('torch.')} on {capability[0]}.{capability[1]}"
        )
    for shape, stride in zip(shapes, strides, strict=True):
        if 1 not in stride[1:]:
            return f"a weight of shape {shape} has strides {stride}; grouped_mm needs one inner stride of 1"
        for step in (stride[0], max(stride[1:])):
            if step * dtype.itemsize % 16:
                return f"a weight of shape {shape} has strides {stride}; grouped_mm needs 16-byte steps"
    return ""


def experts_cuda(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """``experts_reference``, fast; the same arguments and result, but not differentiable."""
    check(x_TH, ids_TK, weights_TK, bank, spec)
    if transformed():
        return experts_reference(x_TH, ids_TK, weights_TK, bank, spec)
    no_triton = why_not(x_TH.device)
    if not no_triton:
        try:
            return experts_triton(x_TH, ids_TK, weights_TK, bank, spec)
        except Unfit as err:
            no_triton = str(err)
    path, _, stacked = path_of(x_TH.device, dtypes(x_TH, spec)[0], bank, no_triton)
    if path == "grouped" and stacked is not None:
        return experts_grouped(x_TH, ids_TK, weights_TK, stacked, spec)
    return experts_loop(x_TH, ids_TK, weights_TK, bank, spec)


def describe_path(bank: ExpertWeights, spec: ExpertsSpec) -> tuple[Path, str]:
    """The path that these weights take in a call whose x has their dtype, and why no better one."""
    w_in, device = bank.w_in(0)[0], bank.w_out(0).device
    no_triton = why_not(device)
    if not no_triton:
        H = w_in.shape[1 if spec.w_in_layout == "oi" else 0]
        try:
            held = weights_of(bank, spec, H, device).held
            function(spec, w_in.dtype, w_in.dtype, held, tf32=False, interpreted=False)
            no_triton = refused(spec, w_in.dtype, w_in.dtype, held, device)
        except Unfit as err:
            no_triton = str(err)
    compute = getattr(torch, spec.compute_dtype) if spec.compute_dtype else w_in.dtype
    path, why, _ = path_of(device, compute, bank, no_triton, launches(spec), _copied(bank), _in_words(bank, spec))
    return path, why


def _in_words(bank: ExpertWeights, spec: ExpertsSpec) -> Callable[[Path], str]:
    """What ``choose_cuda_path`` says of the launches of the other paths."""
    grouped = functools.partial(experts_grouped, grouped_mm=one_launch)
    return lambda path: launches_in_words(grouped if path == "grouped" else experts_loop, bank, spec)


def _copied(bank: ExpertWeights) -> bool:
    """Whether a bank makes weights at each read, as where an expert's neurons are picked from an FFN."""
    if bank.stacked() is not None:
        return False

    def read(e: int) -> tuple[Tensor, ...]:
        return (*bank.w_in(e), bank.w_out(e))

    for e in range(bank.num_experts):
        first = read(e)  # held, so that a second copy lies elsewhere
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(first, read(e), strict=True)):
            return True
    return False


def path_of(
    device: torch.device,
    compute: torch.dtype,
    bank: ExpertWeights,
    no_triton: str,
    kernels: tuple[int, int] = (2, 4),
    copied: bool = False,
    counted: Callable[[Path], str] = lambda path: "",
) -> tuple[Path, str, StackedExpertWeights | None]:
    """:func:`choose_cuda_path` of these weights; and the stack, where there is one."""
    stacked = bank.stacked()
    weights = [] if stacked is None else [*stacked.w_in_s, stacked.w_out_s]
    if any(w.dtype != compute or w.data_ptr() % 16 for w in weights):
        weights = []
    path, why = choose_cuda_path(
        torch.cuda.get_device_capability(device),
        compute,
        [tuple(w.shape) for w in weights],
        [w.stride() for w in weights],
        hasattr(F, "grouped_mm"),
        no_triton,
        kernels,
        copied,
        few_pairs(bank.num_experts),
        counted,
    )
    return path, why, stacked


def experts_grouped(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    bank: StackedExpertWeights,
    spec: ExpertsSpec,
    grouped_mm: GroupedMM | None = None,
) -> Tensor:
    """The grouped path: no loop over experts; no wait for the host where ``grouped_mm`` has none.

    Rows whose id is out of range sort to the end, behind the last offset, where ``grouped_mm`` leaves
    its output unwritten; ``torch.where`` replaces them, so nothing that lies there reaches the sum.
    """
    check(x_TH, ids_TK, weights_TK, bank, spec)
    grouped_mm = grouped_mm or F.grouped_mm
    if not ids_TK.numel():
        return x_TH.new_zeros(len(ids_TK), out_features(bank, spec), dtype=dtypes(x_TH, spec)[2])
    compute, E = dtypes(x_TH, spec)[0], bank.num_experts
    rows = _by_expert(x_TH, ids_TK, weights_TK, E, spec)
    ends_E, expert_R = rows.ends_E.to(torch.int32), rows.held_R.clamp(max=E - 1)

    def product(a: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
        y = grouped_mm(a, w.transpose(-2, -1) if layout == "oi" else w, offs=ends_E)
        return y if b is None else y + b.to(compute)[expert_R]

    h = tuple([product(rows.r_RH, w, b, spec.w_in_layout) for w, b in zip(bank.w_in_s, bank.b_in_s, strict=True)])
    a_RI = torch.where(rows.inside_R1, apply_gate(h, spec), 0)
    o_RH = product(a_RI, bank.w_out_s, bank.b_out_s, spec.w_out_layout)
    if spec.out_norm_eps is not None:
        o_RH = rms_norm(o_RH, None, spec)
        o_RH = o_RH if bank.norm_s is None else o_RH * bank.norm_s.to(compute)[expert_R]
    return _summed(rows, o_RH, spec)


def experts_loop(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """One expert after the other on its rows, for whatever the weights are; the host waits once, for the counts.

    Rows are gathered and their terms added for all experts at once, so the launches are five or six an expert that
    is hit, whatever the order of the sum.
    """
    check(x_TH, ids_TK, weights_TK, bank, spec)
    if not ids_TK.numel():
        return x_TH.new_zeros(len(ids_TK), out_features(bank, spec), dtype=dtypes(x_TH, spec)[2])
    rows = _by_expert(x_TH, ids_TK, weights_TK, bank.num_experts, spec)
    ends = rows.ends_E.tolist()
    begins = [0, *ends[:-1]]
    outputs = [
        one_expert(rows.r_RH[begin:end], bank, e, spec)
        for e, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if begin < end
    ]
    if ends[-1] < ids_TK.numel():
        outputs.append(rows.r_RH.new_zeros(ids_TK.numel() - ends[-1], out_features(bank, spec)))
    return _summed(rows, torch.cat(outputs), spec)


class _Rows(NamedTuple):
    """The R pairs (token, expert) sorted by expert; those that name none last.

    ``held_R`` is each one's expert, E for none; ``ends_E`` where an expert's rows end; ``r_RH`` what the first matmul
    takes; ``inside_R1`` whether the id is an expert's; ``accum`` and ``out`` are dtypes.
    """

    x_RH: Tensor
    w_R1: Tensor
    r_RH: Tensor
    held_R: Tensor
    ends_E: Tensor
    order_R: Tensor
    inside_R1: Tensor
    ids_TK: Tensor
    accum: torch.dtype
    out: torch.dtype


def _by_expert(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, E: int, spec: ExpertsSpec) -> _Rows:
    compute, accum, out = dtypes(x_TH, spec)
    ids_R = ids_TK.reshape(-1).long()  # E need not fit into the dtype of ids: 128 experts named by int8
    held_R, order_R = torch.where(ids_R < 0, E, ids_R).clamp(max=E).sort(stable=True)
    ends_E = torch.searchsorted(held_R, torch.arange(E, device=x_TH.device), right=True)
    x_RH = x_TH[order_R // ids_TK.shape[1]]
    w_R1 = weights_TK.reshape(-1)[order_R].unsqueeze(1)
    r_RH = (x_RH * w_R1 if spec.weight_on == "input" else x_RH).to(compute)
    return _Rows(x_RH, w_R1, r_RH, held_R, ends_E, order_R, (held_R < E).unsqueeze(1), ids_TK, accum, out)


def _summed(rows: _Rows, o_RD: Tensor, spec: ExpertsSpec) -> Tensor:
    """Each token's weighted terms added in the spec's order: (T, D)."""
    K, order_R, inside_R1 = rows.ids_TK.shape[1], rows.order_R, rows.inside_R1
    term_RD = (o_RD if spec.weight_on == "input" else o_RD * rows.w_R1).to(rows.accum)
    if spec.out_of_range == "identity":
        beyond_R1 = ~inside_R1 & (rows.ids_TK.reshape(-1)[order_R] >= 0).unsqueeze(1)
        term_RD = torch.where(beyond_R1, (rows.x_RH * rows.w_R1).to(rows.accum), term_RD)
        inside_R1 = inside_R1 | beyond_R1
    term_RD = torch.where(inside_R1, term_RD, 0)
    where_R = torch.empty_like(order_R)
    where_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    where_TK = where_R.view(-1, K)
    if spec.combine == "expert":
        where_TK = where_TK.sort(dim=-1).values
    y_TD = term_RD[where_TK[:, 0]]
    for k in range(1, K):
        y_TD = y_TD + term_RD[where_TK[:, k]]
    return y_TD.to(rows.out)

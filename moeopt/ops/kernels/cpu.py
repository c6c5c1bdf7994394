"""The CPU kernel: rows sorted by expert, each active expert's weights streamed once, nothing for idle experts.

Shape legend: T tokens, K chosen per token, R = T*K rows, M rows of one expert, H hidden, I intermediate.

    order_R   rows sorted by expert (stable: a token's slots stay in order)
    term_RH   weighted expert outputs in that sorted order, in the accumulator's dtype
    where_TK  which row of term_RH holds token t's k-th term, in the order of the sum

Weights are never copied or laid out anew (only cast, where their dtype is not the compute dtype). Few rows
per expert: the two GEMMs of all experts with one activation between, since the calls cost more than the
memory traffic. Many rows: one expert after the other, while its rows are in cache. float64, and where every expert
takes every row: ``few_calls``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.kernels.few_calls import all_experts, every_expert, in_turn
from moeopt.ops.kernels.gemm import check_width, linear, linear_into, pays_to_fill
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.reference import check, dtypes, out_features, rms_norm

Group = tuple[int, int, int]
"""An expert, and the first and last-plus-one of its rows."""

FEW_ROWS = 12
"""Mean rows per active expert up to which one activation for all experts is the faster way."""


def experts_cpu(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """``experts_reference``, fast; the same arguments and result, but not differentiable."""
    check(x_TH, ids_TK, weights_TK, bank, spec)
    T, K = ids_TK.shape
    if not T * K:
        return x_TH.new_zeros(T, out_features(bank, spec), dtype=dtypes(x_TH, spec)[2])
    if bank.num_experts == K == 1 and (T == 1 or ids_TK.stride(0) == 0) and not ids_TK[0, 0]:
        return _one_for_all(x_TH, weights_TK, bank, spec)
    if all_experts(ids_TK, bank.num_experts):
        return every_expert(x_TH, weights_TK, bank, spec)
    if dtypes(x_TH, spec)[0] is torch.float64:
        return in_turn(x_TH, ids_TK, weights_TK, bank, spec)
    if T == 1:
        return _one_token(x_TH, ids_TK, weights_TK, bank, spec)
    ids_R = ids_TK.reshape(-1)
    sorted_R, order_R = ids_R.sort(stable=True)
    found, counts = torch.unique_consecutive(sorted_R, return_counts=True)
    groups, start = [], 0
    for e, rows in zip(found.tolist(), counts.tolist(), strict=True):
        groups.append((e, start, start + rows))
        start += rows
    if K == 1 and len(groups) == 1:
        return _terms(x_TH, weights_TK, groups, bank, spec).to(dtypes(x_TH, spec)[2])
    x_RH = x_TH.index_select(0, order_R if K == 1 else order_R.div(K, rounding_mode="floor"))
    w_R1 = weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
    term_RH = _terms(x_RH, w_R1, groups, bank, spec)
    return _combine(term_RH, order_R, K, spec).to(dtypes(x_TH, spec)[2])


def _one_for_all(x_TH: Tensor, w_T1: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """A dense FFN: the only expert on every token; no sort, no gather, no scatter."""
    compute, accum, out = dtypes(x_TH, spec)
    r_TH = (x_TH * w_T1 if spec.weight_on == "input" else x_TH).to(compute)
    pairs = zip(bank.w_in(0), bank.b_in(0), strict=True)
    h = tuple([linear(r_TH, *_operands(w, b, compute, spec.w_in_layout)) for w, b in pairs])
    o_TH = linear(apply_gate(h, spec), *_operands(bank.w_out(0), bank.b_out(0), compute, spec.w_out_layout))
    if spec.out_norm_eps is not None:
        o_TH = rms_norm(o_TH.contiguous(), bank.norm(0), spec)
    if spec.weight_on == "output" and not (w_T1.stride(0) == 0 and w_T1[0, 0] == 1):
        o_TH = (o_TH * w_T1).to(accum)
    return o_TH.to(out).contiguous()


def _one_token(x_1H: Tensor, ids_1K: Tensor, weights_1K: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """Decode: no sort and no gather; the rows are in the order of the sum from the start."""
    ids, w_K1 = ids_1K[0].tolist(), weights_1K.t()
    if spec.combine == "expert" and sorted(ids) != ids:
        slots = sorted(range(len(ids)), key=ids.__getitem__)
        ids, w_K1 = [ids[k] for k in slots], w_K1[slots]
    groups = [(e, i, i + 1) for i, e in enumerate(ids)]
    terms = _terms(x_1H.expand(len(ids), -1), w_K1, groups, bank, spec).split(1)
    y_1H: Tensor = terms[0]
    for term_1H in terms[1:]:
        y_1H += term_1H
    return y_1H.to(dtypes(x_1H, spec)[2], copy=True)


def _terms(x_RH: Tensor, w_R1: Tensor, groups: list[Group], bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """The weighted output of every row, in the accumulator's dtype."""
    compute, accum, _ = dtypes(x_RH, spec)
    inside = [group for group in groups if 0 <= group[0] < bank.num_experts]
    term_RH = x_RH.new_empty(x_RH.shape[0], out_features(bank, spec), dtype=accum)
    r_RH = (x_RH * w_R1 if spec.weight_on == "input" else x_RH).to(compute)
    if inside:
        few = x_RH.shape[0] <= FEW_ROWS * len(inside) and not isinstance(bank, QuantizedExpertWeights)
        kernel = _together if few else _one_by_one  # of quantised experts one at a time is held in floats
        kernel(r_RH, None if spec.weight_on == "input" else w_R1, inside, bank, spec, term_RH)
    if len(inside) < len(groups):
        for e, begin, end in groups:
            if e >= bank.num_experts and spec.out_of_range == "identity":
                torch.mul(x_RH[begin:end], w_R1[begin:end], out=term_RH[begin:end])
            elif not 0 <= e < bank.num_experts:
                term_RH[begin:end] = 0
    return term_RH


def _together(
    r_RH: Tensor, w_R1: Tensor | None, groups: list[Group], bank: ExpertWeights, spec: ExpertsSpec, term_RH: Tensor
) -> None:
    """All first GEMMs, one activation, all second GEMMs; experts of several sizes go one by one."""
    R, wide = r_RH.shape[0], 0 if spec.w_in_layout == "oi" else 1
    w_in = [bank.w_in(e) for e, _, _ in groups]
    if len({w[0].shape[wide] for w in w_in}) > 1:
        _one_by_one(r_RH, w_R1, groups, bank, spec, term_RH)
        return
    h = tuple([r_RH.new_empty(R, w.shape[wide]) for w in w_in[0]])
    for (e, begin, end), ws in zip(groups, w_in, strict=True):
        for h_RO, w, b in zip(h, ws, bank.b_in(e), strict=True):
            _multiply(h_RO, r_RH, begin, end, *_operands(w, b, r_RH.dtype, spec.w_in_layout))
    a_RI = apply_gate(h, spec)
    o_RH = r_RH.new_empty(R, term_RH.shape[1])
    for e, begin, end in groups:
        w, b = _operands(bank.w_out(e), bank.b_out(e), r_RH.dtype, spec.w_out_layout)
        _multiply(o_RH, a_RI, begin, end, w, b)
        if spec.out_norm_eps is not None:
            o_MH = o_RH[begin:end]
            o_MH.copy_(rms_norm(o_MH, bank.norm(e), spec))
    _weigh(o_RH, w_R1, term_RH)


def _one_by_one(
    r_RH: Tensor, w_R1: Tensor | None, groups: list[Group], bank: ExpertWeights, spec: ExpertsSpec, term_RH: Tensor
) -> None:
    """Each expert from its rows to its terms; a GEMM may leave its result transposed, and the next takes it so."""
    dtype = r_RH.dtype
    for e, begin, end in groups:
        low, high = _window(begin, end, r_RH)
        r_MH, pairs = r_RH[low:high], zip(bank.w_in(e), bank.b_in(e), strict=True)
        h = tuple([linear(r_MH, *_operands(w, b, dtype, spec.w_in_layout)) for w, b in pairs])
        o_MH = linear(apply_gate(h, spec), *_operands(bank.w_out(e), bank.b_out(e), dtype, spec.w_out_layout))
        if spec.out_norm_eps is not None:
            o_MH = rms_norm(o_MH.contiguous(), bank.norm(e), spec)
        _weigh(o_MH[begin - low : end - low], None if w_R1 is None else w_R1[begin:end], term_RH[begin:end])


def _multiply(y_RO: Tensor, x_RI: Tensor, begin: int, end: int, w_OI: Tensor, b_O: Tensor | None) -> None:
    low, high = _window(begin, end, x_RI)
    if high - low == end - begin:
        linear_into(y_RO[begin:end], x_RI[begin:end], w_OI, b_O)
    else:
        y_RO[begin:end] = linear(x_RI[low:high], w_OI, b_O)[begin - low : end - low]


def _window(begin: int, end: int, x_RI: Tensor) -> tuple[int, int]:
    """Rows to multiply so that rows begin..end are among them: 2, 4, 8 or whole sixteens, where filling up is free.

    oneDNN compiles a kernel for each new row count (about 2 ms a GEMM), and AMX works in tiles of 16
    anyway; neighbouring experts' rows fill the last tile, and their results are dropped. On other CPUs those
    rows cost what rows cost, and only the expert's own are multiplied.
    """
    rows = end - begin
    if x_RI.dtype.itemsize != 2 or rows == 1:
        return begin, end
    whole = 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16
    whole = min(whole, x_RI.shape[0])
    if whole == rows or not pays_to_fill(whole, x_RI.dtype):
        return begin, end
    low = min(begin, x_RI.shape[0] - whole)
    return low, low + whole


def _weigh(o_MH: Tensor, w_M1: Tensor | None, term_MH: Tensor) -> None:
    """o * w, rounded once in their promoted dtype and once to the accumulator's."""
    check_width(term_MH, o_MH.shape[1])
    if w_M1 is None:
        term_MH.copy_(o_MH)
    else:
        torch.mul(o_MH, w_M1, out=term_MH)


def _combine(term_RH: Tensor, order_R: Tensor, K: int, spec: ExpertsSpec) -> Tensor:
    """Sum each token's K terms, one after the other, by slot or by ascending expert."""
    where_R = torch.empty_like(order_R)
    where_R[order_R] = torch.arange(order_R.shape[0])
    where_TK = where_R.view(-1, K)
    if spec.combine == "expert":
        where_TK = where_TK.sort(dim=-1).values
    columns = where_TK.t().contiguous()
    y_TH = term_RH.index_select(0, columns[0])
    for column_T in columns[1:]:
        y_TH += term_RH.index_select(0, column_T)
    return y_TH


def _operands(w: Tensor, b: Tensor | None, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor | None]:
    if w.dtype != dtype:
        w = w.to(dtype)
    if b is not None and b.dtype != dtype:
        b = b.to(dtype)
    return w if layout == "oi" else w.t(), b

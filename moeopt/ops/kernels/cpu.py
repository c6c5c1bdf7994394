"""The CPU kernel: rows sorted by expert, each active expert's weights streamed once, nothing for idle experts.

Shape legend: T tokens, K chosen per token, R = T*K rows, M rows of one expert, H hidden, I intermediate.

    order_R   rows sorted by expert (stable: a token's slots stay in order)
    term_RH   weighted expert outputs in that sorted order, in the accumulator's dtype
    where_TK  which row of term_RH holds token t's k-th term, in the order of the sum

Weights are never copied or laid out anew (only cast, where their dtype is not the compute dtype).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.bank import Bank
from moeopt.ops.kernels.gemm import linear
from moeopt.ops.reference import check, dtypes, out_features, rms_norm


def experts_cpu(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: Bank, spec: ExpertsSpec) -> Tensor:
    """``experts_reference``, fast; the same arguments and result, but not differentiable."""
    check(x_TH, ids_TK, weights_TK, bank, spec)
    if not ids_TK.numel():
        return x_TH.new_zeros(x_TH.shape[0], out_features(bank, spec), dtype=dtypes(x_TH, spec)[2])
    if x_TH.shape[0] == 1:
        return _one_token(x_TH, ids_TK, weights_TK, bank, spec)
    return _many_tokens(x_TH, ids_TK, weights_TK, bank, spec)


def _one_token(x_1H: Tensor, ids_1K: Tensor, weights_1K: Tensor, bank: Bank, spec: ExpertsSpec) -> Tensor:
    """Decode: K matrix-vector products, one activation for all K, no sort and no gather."""
    compute, accum, out = dtypes(x_1H, spec)
    ids = ids_1K[0].tolist()
    if spec.combine == "expert":
        slots = sorted(range(len(ids)), key=ids.__getitem__)
    else:
        slots = list(range(len(ids)))
    inside = [k for k in slots if 0 <= ids[k] < bank.num_experts]
    weights = weights_1K[0].unbind()
    hs = []
    r_1H = x_1H.to(compute)
    for k in inside:
        if spec.weight_on == "input":
            r_1H = (x_1H * weights_1K[:, k, None]).to(compute)
        hs.append(_project_in(r_1H, bank, ids[k], spec))
    terms: dict[int, Tensor] = {}
    if inside:
        stacked = tuple([torch.cat(part) for part in zip(*hs, strict=True)]) if len(hs) > 1 else hs[0]
        a_KI = apply_gate(stacked, spec)
        for k, a_1I in zip(inside, a_KI.split(1), strict=True):
            o_1H = _project_out(a_1I, bank, ids[k], spec)
            terms[k] = o_1H if spec.weight_on == "input" else o_1H * weights_1K[:, k, None]
    if spec.out_of_range == "identity":
        for k in slots:
            if ids[k] >= bank.num_experts:
                terms[k] = x_1H * weights[k].unsqueeze(0)
    y_1H = x_1H.new_zeros(1, out_features(bank, spec), dtype=accum)
    for k in slots:
        if k in terms:
            y_1H += terms[k].to(accum)
    return y_1H.to(out)


def _many_tokens(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: Bank, spec: ExpertsSpec) -> Tensor:
    compute, accum, out = dtypes(x_TH, spec)
    T, K = ids_TK.shape
    ids_R = ids_TK.reshape(-1)
    order_R = ids_R.argsort(stable=True)
    found, counts = torch.unique_consecutive(ids_R[order_R], return_counts=True)
    token_R = order_R if K == 1 else order_R.div(K, rounding_mode="floor")
    w_R1 = weights_TK.reshape(-1)[order_R].unsqueeze(1)
    term_RH = x_TH.new_empty(T * K, out_features(bank, spec), dtype=accum)
    start = 0
    for e, rows in zip(found.tolist(), counts.tolist(), strict=True):
        begin, start = start, start + rows
        term_MH, w_M1 = term_RH[begin:start], w_R1[begin:start]
        if e < 0 or (e >= bank.num_experts and spec.out_of_range == "nothing"):
            term_MH.zero_()
            continue
        x_MH = x_TH.index_select(0, token_R[begin:start])
        if e >= bank.num_experts:
            torch.mul(x_MH, w_M1, out=term_MH)
        elif spec.weight_on == "input":
            a_MI = apply_gate(_project_in((x_MH * w_M1).to(compute), bank, e, spec), spec)
            term_MH.copy_(_project_out(a_MI, bank, e, spec))
        else:
            a_MI = apply_gate(_project_in(x_MH.to(compute), bank, e, spec), spec)
            torch.mul(_project_out(a_MI, bank, e, spec), w_M1, out=term_MH)
    return _combine(term_RH, order_R, K, spec).to(out)


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


def _project_in(r_MH: Tensor, bank: Bank, e: int, spec: ExpertsSpec) -> tuple[Tensor, ...]:
    pairs = zip(bank.w_in(e), bank.b_in(e), strict=True)
    return tuple([_linear(r_MH, w, b, spec.w_in_layout) for w, b in pairs])


def _project_out(a_MI: Tensor, bank: Bank, e: int, spec: ExpertsSpec) -> Tensor:
    o_MH = _linear(a_MI, bank.w_out(e), bank.b_out(e), spec.w_out_layout)
    return o_MH if spec.out_norm_eps is None else rms_norm(o_MH.contiguous(), bank.norm(e), spec)


def _linear(x: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    if b is not None and b.dtype != x.dtype:
        b = b.to(x.dtype)
    return linear(x, w if layout == "oi" else w.t(), b)

"""The op in as few calls of PyTorch as there can be: for float64, and where every expert runs on every token.

Shape legend: T tokens, E experts, K chosen per token, R = T*K rows, M rows of one expert, H hidden.

A block of small experts is made of calls, not of products, and its own loop makes a dozen for each expert. Here an
expert is its products, its activation and its weight. Rows are sorted in Python where they are few, and by PyTorch
where they are many; where every expert takes all rows nothing is sorted, gathered or put back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights, StackedExpertWeights
from moeopt.ops.kernels.gemm import linear
from moeopt.ops.reference import dtypes, out_features, rms_norm

SORTED_HERE = 512
"""Rows up to which Python's own lists are sorted sooner than PyTorch is called."""


def all_experts(ids_TK: Tensor, E: int) -> bool:
    """Whether it is known without a look at each token that row t names the experts 0, 1, ... E - 1 in their order."""
    alike = ids_TK.shape[1] == E and (ids_TK.shape[0] == 1 or ids_TK.stride(0) == 0)
    return alike and ids_TK.shape[0] > 0 and ids_TK[0].tolist() == list(range(E))


def listed(bank: ExpertWeights) -> ExpertWeights:
    """The same weights as lists where those are made sooner than each expert is looked up by itself."""
    if isinstance(bank, StackedExpertWeights):
        ws, bs = [w.unbind(0) for w in bank.w_in_s], [None if b is None else b.unbind(0) for b in bank.b_in_s]
        out, norm = bank.b_out_s, bank.norm_s
        return ListExpertWeights(
            ws,
            bank.w_out_s.unbind(0),
            bs,
            None if out is None else out.unbind(0),
            None if norm is None else norm.unbind(0),
        )
    together: Callable[[], ExpertWeights | None] | None = getattr(bank, "listed", None)
    return bank if together is None else together() or bank


def every_expert(x_TH: Tensor, weights_TE: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """The op where :func:`all_experts` holds."""
    compute, accum, out = dtypes(x_TH, spec)
    bank = listed(bank)
    y_TH: Tensor | None = None
    on_input = spec.weight_on == "input"
    r_TH = x_TH if on_input else x_TH.to(compute)
    for e, w_T1 in enumerate(weights_TE.split(1, 1)):
        o_TH = _expert((x_TH * w_T1).to(compute) if on_input else r_TH, bank, e, spec)
        term_TH = (o_TH if on_input else o_TH * w_T1).to(accum)
        y_TH = term_TH if y_TH is None else y_TH.add_(term_TH)
    assert y_TH is not None
    return y_TH.to(out).contiguous()


def in_turn(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """The op for at least one token and slot."""
    T, K = ids_TK.shape
    _, accum, out = dtypes(x_TH, spec)
    if T == 1:
        return _one_token(x_TH, ids_TK[0].tolist(), weights_TK, bank, spec).to(out)
    if bank.num_experts <= 2 * T * K:
        bank = listed(bank)
    order_R, experts, counts = by_expert(ids_TK)
    x_RH = x_TH.index_select(0, order_R if K == 1 else order_R.div(K, rounding_mode="floor"))
    w_R1 = weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
    parts = zip(experts, x_RH.split(counts), w_R1.split(counts), strict=True)
    term_RH = torch.cat([_term(x_MH, w_M1, bank, e, spec) for e, x_MH, w_M1 in parts]).to(accum)
    where_R = torch.empty_like(order_R)
    where_R[order_R] = torch.arange(T * K)
    if spec.combine == "expert":
        where_R = where_R.view(T, K).sort(dim=-1).values.view(-1)
    first_TH, *others = term_RH.index_select(0, where_R).view(T, K, -1).unbind(1)
    for term_TH in others:
        first_TH = first_TH + term_TH
    return first_TH.to(out).contiguous()


def _one_token(x_1H: Tensor, ids: list[int], weights_1K: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    terms = list(zip(ids, weights_1K.split(1, 1), strict=True))
    if spec.combine == "expert":
        terms.sort(key=lambda term: term[0])
    y_1H: Tensor | None = None
    for e, w_11 in terms:
        if e < 0 or (e >= bank.num_experts and spec.out_of_range == "nothing"):
            continue
        term_1H = _term(x_1H, w_11, bank, e, spec).to(dtypes(x_1H, spec)[1])
        y_1H = term_1H if y_1H is None else y_1H + term_1H
    if y_1H is None:
        return x_1H.new_zeros(1, out_features(bank, spec), dtype=dtypes(x_1H, spec)[1])
    return y_1H.contiguous()


def by_expert(ids_TK: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """The rows in the order of their experts and tokens; the experts, and how many rows each has."""
    if ids_TK.numel() > SORTED_HERE:
        sorted_R, order_R = ids_TK.reshape(-1).sort(stable=True)
        found, counts = torch.unique_consecutive(sorted_R, return_counts=True)
        return order_R, found.tolist(), counts.tolist()
    rows: dict[int, list[int]] = {}
    for row, e in enumerate(ids_TK.reshape(-1).tolist()):
        rows.setdefault(e, []).append(row)
    experts = sorted(rows)
    return torch.tensor([r for e in experts for r in rows[e]]), experts, [len(rows[e]) for e in experts]


def _term(x_MH: Tensor, w_M1: Tensor, bank: ExpertWeights, e: int, spec: ExpertsSpec) -> Tensor:
    """Expert ``e``'s weighted output of its rows; what an id adds that names no expert."""
    if e < 0 or (e >= bank.num_experts and spec.out_of_range == "nothing"):
        return x_MH.new_zeros(len(x_MH), out_features(bank, spec))
    if e >= bank.num_experts:
        return x_MH * w_M1
    compute = dtypes(x_MH, spec)[0]
    if spec.weight_on == "input":
        return _expert((x_MH * w_M1).to(compute), bank, e, spec)
    return _expert(x_MH.to(compute), bank, e, spec) * w_M1


def _expert(r_MH: Tensor, bank: ExpertWeights, e: int, spec: ExpertsSpec) -> Tensor:
    """Expert ``e`` on rows of the compute dtype."""
    layout = spec.w_in_layout
    pairs = zip(bank.w_in(e), bank.b_in(e), strict=True)
    h = tuple([_product(r_MH, w, b, layout) for w, b in pairs])
    o_MH = _product(apply_gate(h, spec), bank.w_out(e), bank.b_out(e), spec.w_out_layout)
    return o_MH if spec.out_norm_eps is None else rms_norm(o_MH.contiguous(), bank.norm(e), spec)


def _product(x: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    if b is not None and b.dtype != x.dtype:
        b = b.to(x.dtype)
    w = w if layout == "oi" else w.t()
    return F.linear(x, w, b) if x.dtype is torch.float64 else linear(x, w, b)

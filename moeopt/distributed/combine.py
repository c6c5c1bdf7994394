"""The terms of each token, come back from the ranks, summed as the op sums them in one process.

Shape legend: T tokens, K chosen per token, R = T K pairs, S of them with a term, H hidden, D width of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.reference import dtypes


def summed(
    term_SD: Tensor, order_S: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor,
    spec: ExpertsSpec | RowFunction, E: int,
) -> Tensor:  # fmt: skip
    """The sum of each token's terms in the accumulator's dtype, in ``spec.combine`` order.

    Args:
        term_SD: in the accumulator's dtype.
        order_S: which of the R pairs each term is of.
        E: how many experts there are; a larger id adds what ``spec.out_of_range`` says.
    """
    T, K = ids_TK.shape
    if len(order_S) == T * K and K and not (isinstance(spec, RowFunction) and spec.combine == "slot"):
        return _columns(term_SD, order_S, ids_TK, spec)
    term_RD = term_SD.new_zeros(T * K, term_SD.shape[1]).index_copy(0, order_S, term_SD)
    if spec.out_of_range == "identity":
        term_RD = term_RD + torch.where(ids_TK.reshape(-1, 1) >= E, _identities(x_TH, weights_TK, term_RD.dtype), 0)
    term_TKD = term_RD.view(T, K, term_SD.shape[1])
    if spec.combine == "slot" and isinstance(spec, RowFunction) and K > 1:
        return term_TKD.sum(1)  # as row_function sums: rounded once
    if spec.combine == "expert":
        order_TK = ids_TK.argsort(dim=1, stable=True)
        term_TKD = term_TKD.gather(1, order_TK.unsqueeze(2).expand_as(term_TKD))
    total_TD = term_TKD.new_zeros(T, term_TKD.shape[2]) if K == 0 else term_TKD[:, 0]
    for k in range(1, K):
        total_TD = total_TD + term_TKD[:, k]
    return total_TD


def _columns(term_RD: Tensor, order_R: Tensor, ids_TK: Tensor, spec: ExpertsSpec | RowFunction) -> Tensor:
    """The same where each pair has a term: read where it lies, and not laid out anew first."""
    where_R = torch.empty_like(order_R)
    where_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    where_TK = where_R.view(ids_TK.shape)
    if spec.combine == "expert":
        where_TK = where_TK.gather(1, ids_TK.argsort(dim=1, stable=True))
    first_T, *rest = where_TK.t().contiguous()
    total_TD = term_RD.index_select(0, first_T)
    for where_T in rest:
        total_TD = total_TD + term_RD.index_select(0, where_T)
    return total_TD


def identity_sum(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, E: int, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(T, D) in ``dtype``: what ids of no expert add, which needs no rank but the token's own."""
    if spec.out_of_range != "identity":
        return x_TH.new_zeros(len(x_TH), width, dtype=dtype)
    accum = dtypes(x_TH, spec)[1]
    term_TKH = _identities(x_TH, weights_TK, accum).view(*ids_TK.shape, x_TH.shape[1])
    return torch.where((ids_TK >= E).unsqueeze(2), term_TKH, 0).to(dtype).sum(1)


def wide_enough(accum: torch.dtype) -> torch.dtype:
    """The dtype in which partial sums travel: a sum of sums in 16 bits would be rounded more often than the op's."""
    return torch.float32 if accum.itemsize < 4 else accum


def _identities(x_TH: Tensor, weights_TK: Tensor, accum: torch.dtype) -> Tensor:
    """(R, H): each token times each of its weights."""
    return (x_TH.unsqueeze(1) * weights_TK.unsqueeze(2)).to(accum).reshape(-1, x_TH.shape[1])

"""Dispatch alone: experts that answer with a tag, so that a sum says which of them saw which token with what weight.

Shape legend: T tokens, K chosen per token, E experts, P ranks, N rows that arrive at a rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moeopt.distributed.forward import RankExperts
from moeopt.distributed.homes import ExpertHomes
from moeopt.ir.specs import ExpertsSpec
from moeopt.value_types import PyObject


class TagCase(NamedTuple):
    """Tokens as whole numbers that no other token of any rank has, and where they go."""

    name: str
    token_T: Tensor
    ids_TK: Tensor


def tag_cases(rank: int, size: int, homes: ExpertHomes, replicated: bool, K: int = 3) -> Iterator[TagCase]:
    """What dispatch gets wrong first: no tokens, uneven tokens, all to one rank, ids of no expert, an id twice."""
    E, who = len(homes.ranks), 0 if replicated else rank
    g = torch.Generator().manual_seed(1 + who)
    first = torch.tensor([own[0] for r in range(size) if (own := homes.experts_of(r))])
    counts = {
        "as many each": 7, "none on the first rank": 5 * min(who, 1), "ever more": 3 * who + 1,
        "one on the last rank": int(who == size - 1), "none": 0,
    }  # fmt: skip
    for name, T in counts.items():
        yield _tagged(name, who, torch.randint(-2, E + 2, (5 if replicated else T, K), generator=g))
    for e in first.tolist():
        yield _tagged(f"all to expert {e}", who, torch.full((6 + who, K), e))
    yield _tagged("no expert", who, torch.full((4, K), -1))
    yield _tagged("beyond all experts", who, torch.tensor([[E, E + 9, 0]]))


def _tagged(name: str, rank: int, ids_TK: Tensor) -> TagCase:
    return TagCase(name, 1.0 + rank * 4096 + torch.arange(len(ids_TK), dtype=torch.float64), ids_TK)


def tag_difference(bank: RankExperts, spec: PyObject, case: TagCase) -> str:
    """Run ``case`` through the dispatch of ``bank``; what is not exact, or "". A collective call."""
    device = torch.device("cpu") if bank.local is None else _device(bank)
    E, (T, K) = bank.num_experts, case.ids_TK.shape
    tagged = ExpertsSpec(combine=spec.combine, out_of_range=spec.out_of_range)
    dispatch = dataclasses.replace(bank.dispatch, width=E, trained=False, number=-2 - bank.dispatch.number)
    weights_TK = (2.0 * torch.arange(K, dtype=torch.float64) + 3).expand(T, K)
    x_TE = case.token_T.unsqueeze(1).expand(T, E).contiguous()
    own = torch.tensor(bank.own, dtype=torch.int64, device=device)

    def answer(x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor, dtype: torch.dtype) -> Tensor:
        return one_hot_sum(x_NE, ids_NK, weights_NK, own, E).to(dtype)

    ids_TK = case.ids_TK.to(device)
    got_TE = dispatch(x_TE.to(device), ids_TK, weights_TK.contiguous().to(device), tagged, answer)
    all_E = torch.arange(E, device=device)
    inside_TK = torch.where(ids_TK < E, ids_TK, -1)
    want_TE = one_hot_sum(x_TE.to(device), inside_TK, weights_TK.to(device), all_E, E)
    if spec.out_of_range == "identity":
        want_TE = want_TE + x_TE.to(device) * (weights_TK.to(device) * (ids_TK >= E)).sum(1, keepdim=True)
    wrong = (got_TE != want_TE).nonzero()
    if not len(wrong):
        return ""
    t, e = wrong[0].tolist()
    return (
        f"in the case '{case.name}' token {t} with ids {case.ids_TK[t].tolist()} got {float(got_TE[t, e]):g} of expert "
        f"{e}, and {float(want_TE[t, e]):g} is right"
    )


def one_hot_sum(x_NE: Tensor, ids_NK: Tensor, weights_NK: Tensor, expert_of_I: Tensor, E: int) -> Tensor:
    """(N, E): in column e, x times the weights with which the row names expert e; ids count in ``expert_of_I``."""
    y_NE = x_NE.new_zeros(len(x_NE), E)
    for k in range(ids_NK.shape[1]):
        known_N = ids_NK[:, k] >= 0
        column_N = expert_of_I[ids_NK[known_N, k]]
        y_NE[known_N.nonzero().view(-1), column_N] += x_NE[known_N, column_N] * weights_NK[known_N, k]
    return y_NE


def _device(bank: RankExperts) -> torch.device:
    first = bank.local.slots(0)[0] if hasattr(bank.local, "slots") else bank.local.w_out(0)
    found: torch.device = first.device
    return found

"""Tokens go to the ranks of their experts and come back as sums: three forms, one contract.

    rows     a row for each token and expert; the sender adds the terms in the op's own order: the bits of one process
    ranks    a row for each token and rank, with its ids and weights; partial sums come back: the fewest bytes
    reduce   every rank has all tokens and runs its own experts on them; the partial sums are added: an all-reduce

``rows`` where every rank has all tokens sends nothing out: each rank sends its terms to all. Ids that a rank does not
hold become -1, which the op defines as adding nothing, so no kernel differs from that of one process.

Terms and sums travel in the accumulator's dtype, sums of 16-bit accumulators in float32. Shape legend: T tokens of this
rank, K experts chosen per token, H hidden, D width of the result, P ranks, N rows that arrive here, S rows sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeopt.distributed.agreed_ids import agreed_ids
from moeopt.distributed.channel import Channel
from moeopt.distributed.combine import identity_sum, summed, wide_enough
from moeopt.distributed.exchange import Transfer
from moeopt.distributed.homes import ExpertHomes
from moeopt.distributed.own_experts import OwnExperts
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.reference import dtypes

DispatchForm = Literal["rows", "ranks", "reduce"]
Compute = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""(x (N, H), ids (N, K) of this rank's experts or -1, weights (N, K), dtype) -> their weighted sum (N, D) in dtype."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Dispatch:
    """How the experts of one op are reached from this rank.

    Args:
        block: the module path of the op's block, for errors.
        number: of the op in the model.
        form: see the module's docstring.
        replicated: whether every rank has the same tokens.
        width: D.
        trained: whether any expert's weights, here or elsewhere, may need gradients.
        own_experts: what tells whether the ranks still have experts of their own; None where none are divided.
    """

    channel: Channel
    homes: ExpertHomes
    block: str
    number: int
    form: DispatchForm
    replicated: bool
    width: int
    trained: bool
    own_experts: OwnExperts | None = None

    def __call__(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, compute: Compute
    ) -> Tensor:
        """What ``moeopt::experts`` of all experts gives for this rank's tokens; a collective call.

        Raises:
            RankLostError: another rank is gone, or stands elsewhere.
        """
        self.channel.block = self.block
        grad = torch.is_grad_enabled() and (x_TH.requires_grad or weights_TK.requires_grad or self.trained)
        if self.replicated:
            way = self._all_reduced if self.form == "reduce" else self._gathered
        else:
            way = self._per_rank if self.form == "ranks" else self._per_expert
        return way(x_TH, ids_TK, weights_TK, spec, compute, grad).to(dtypes(x_TH, spec)[2])

    def _transfer(self, x: Tensor, weights: Tensor, counts_P: Tensor, grad: bool, more: int = 0) -> Transfer:
        kinds = [_DTYPES.index(d) if d in _DTYPES else len(_DTYPES) for d in (x.dtype, weights.dtype)]
        flags = grad + 2 * (grad and x.requires_grad) + 4 * (grad and weights.requires_grad)
        step = ("rows", "ranks", "reduce").index(self.form) + 1 + more
        facts = [self.number, step, kinds[0] * 10 + kinds[1], x.shape[1], weights.shape[1], flags]
        return Transfer(self.channel, "sending tokens to their experts", counts_P, facts, grad, self.own_experts)

    def _per_expert(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, compute: Compute,
        grad: bool,
    ) -> Tensor:  # fmt: skip
        K, P = ids_TK.shape[1], self.channel.size
        rank_TK = self.homes.ranks_for(ids_TK, self.channel.rank)
        order_R = rank_TK.reshape(-1).argsort(stable=True)
        counts_P = torch.bincount(rank_TK.reshape(-1), minlength=P + 1)[:P]
        transfer = self._transfer(x_TH, weights_TK, counts_P, grad)
        to, of = transfer.splits
        order_S = order_R[: sum(to)]
        local_S = self.homes.numbers_at(ids_TK, rank_TK).reshape(-1)[order_S].to(torch.int32)
        ids_N = self.channel.send("sending ids", local_S, to, of, described=True)
        x_NH, weights_N = transfer.send(
            "sending tokens", x_TH[order_S.div(max(K, 1), rounding_mode="floor")], weights_TK.reshape(-1)[order_S]
        )
        term_ND = compute(x_NH, ids_N.long().unsqueeze(1), weights_N.unsqueeze(1), dtypes(x_TH, spec)[1])
        (back_SD,) = transfer.send("returning results", term_ND, back=True)
        return summed(back_SD, order_S, x_TH, ids_TK, weights_TK, spec, len(self.homes.ranks))

    def _per_rank(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, compute: Compute,
        grad: bool,
    ) -> Tensor:  # fmt: skip
        P = self.channel.size
        rank_TK = self.homes.ranks_for(ids_TK, self.channel.rank)
        goes_PT = (rank_TK.unsqueeze(0) == torch.arange(P, device=ids_TK.device).view(P, 1, 1)).any(2)
        rank_S, token_S = goes_PT.nonzero(as_tuple=True)
        transfer = self._transfer(x_TH, weights_TK, goes_PT.sum(1), grad)
        to, of = transfer.splits
        there_SK = torch.where(rank_TK[token_S] == rank_S.unsqueeze(1), rank_TK[token_S], P)
        local_SK = self.homes.numbers_at(ids_TK[token_S], there_SK).to(torch.int32)
        ids_NK = self.channel.send("sending ids", local_SK, to, of, described=True)
        x_NH, weights_NK = transfer.send("sending tokens", x_TH[token_S], weights_TK[token_S])
        wide = wide_enough(dtypes(x_TH, spec)[1])
        part_ND = compute(x_NH, ids_NK.long(), weights_NK, wide)
        (back_SD,) = transfer.send("returning results", part_ND, back=True)
        y_TD = identity_sum(x_TH, ids_TK, weights_TK, spec, len(self.homes.ranks), self.width, wide)
        return y_TD.index_add(0, token_S, back_SD)

    def _all_reduced(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, compute: Compute,
        grad: bool,
    ) -> Tensor:  # fmt: skip
        x_TH, ids_TK, weights_TK, transfer = self._same_tokens(x_TH, ids_TK, weights_TK, grad)
        own, wide = self.channel.rank, wide_enough(dtypes(x_TH, spec)[1])
        rank_TK = self.homes.ranks_for(ids_TK, None)
        local_TK = self.homes.numbers_at(ids_TK, torch.where(rank_TK == own, rank_TK, self.channel.size))
        part_TD = compute(x_TH, local_TK, weights_TK, wide)
        if own == 0:  # what needs no expert is added once
            part_TD = part_TD + identity_sum(x_TH, ids_TK, weights_TK, spec, len(self.homes.ranks), self.width, wide)
        return transfer.add("adding results", part_TD)

    def _gathered(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, spec: ExpertsSpec | RowFunction, compute: Compute,
        grad: bool,
    ) -> Tensor:  # fmt: skip
        x_TH, ids_TK, weights_TK, transfer = self._same_tokens(x_TH, ids_TK, weights_TK, grad)
        K, own = ids_TK.shape[1], self.channel.rank
        rank_TK = self.homes.ranks_for(ids_TK, None)
        order_R = rank_TK.reshape(-1).argsort(stable=True)
        order_S = order_R[: int((rank_TK < self.channel.size).sum())]
        mine_N = order_S[rank_TK.reshape(-1)[order_S] == own]
        local_N = self.homes.numbers_at(ids_TK, rank_TK).reshape(-1)[mine_N]
        term_ND = compute(
            x_TH[mine_N.div(max(K, 1), rounding_mode="floor")], local_N.unsqueeze(1),
            weights_TK.reshape(-1)[mine_N].unsqueeze(1), dtypes(x_TH, spec)[1],
        )  # fmt: skip
        counts = torch.bincount(rank_TK.reshape(-1), minlength=self.channel.size + 1)[: self.channel.size]
        transfer.splits = ([len(mine_N)] * self.channel.size, counts.tolist())
        back_SD = transfer.gather("returning results", term_ND)
        return summed(back_SD, order_S, x_TH, ids_TK, weights_TK, spec, len(self.homes.ranks))

    def _same_tokens(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor, Transfer]:
        """What every rank must have alike, compared; a gradient of x or of the weights is the sum of the ranks'."""
        zero_P = ids_TK.new_zeros(self.channel.size, dtype=torch.int64)
        transfer = self._transfer(x_TH, weights_TK, zero_P, grad)
        ids_TK = agreed_ids(self.channel, x_TH, ids_TK, weights_TK)
        x_TH, weights_TK = transfer.share(x_TH, weights_TK)
        return x_TH, ids_TK, weights_TK, transfer

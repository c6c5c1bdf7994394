"""The float64 truth of one op, of which every rank computes its own experts: no rank needs all of them.

Shape legend: T tokens, D width of the result.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moeopt.distributed.forward import RankExperts
from moeopt.distributed.samples import SampledCase
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.reference import experts_reference
from moeopt.ops.row_function import SlotBank, expert_by_expert
from moeopt.value_types import PyObject
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR, MISTRUST, typical


def true_sums(bank: RankExperts, case: SampledCase, spec: ExpertsSpec | RowFunction, rank: int) -> Tensor:
    """(T, D) in float64: what the experts add whose first home is this rank."""
    homes, ids_TK = bank.dispatch.homes, case.ids_TK
    if not bank.own:
        return case.x_TH.new_zeros(len(ids_TK), bank.dispatch.width, dtype=torch.float64)
    first = torch.tensor([ranks[0] for ranks in homes.ranks], device=ids_TK.device)
    known_TK = (ids_TK >= 0) & (ids_TK < len(homes.ranks))
    rank_TK = torch.where(known_TK, first[torch.where(known_TK, ids_TK, 0).long()], homes.size)
    local_TK = homes.numbers_at(ids_TK, torch.where(rank_TK == rank, rank_TK, homes.size))
    local: PyObject = bank.local
    if isinstance(local, QuantizedExpertWeights) and isinstance(spec, ExpertsSpec):  # the exact products of the codes
        local = local.handed_out((spec.w_in_layout, spec.w_out_layout), torch.float64)
    call = case.x_TH.double(), local_TK, case.weights_TK.double(), local
    if isinstance(spec, RowFunction):
        exact = dataclasses.replace(spec, out_of_range="nothing", accum_dtype="float64", out_dtype="float64")
        return expert_by_expert(*call[:3], _DoubleSlots(bank.local), exact, double=True)
    return experts_reference(
        *call,
        dataclasses.replace(
            spec, out_of_range="nothing", compute_dtype="float64", act_dtype=None, accum_dtype="float64",
            out_dtype="float64",
        ),
    )  # fmt: skip


class _DoubleSlots:
    """Another bank's tensors in float64, an expert at a time."""

    def __init__(self, bank: SlotBank) -> None:
        self._bank, self.num_experts = bank, bank.num_experts

    def slots(self, e: int) -> list[Tensor]:
        return [t.double() if t.is_floating_point() else t for t in self._bank.slots(e)]


def required_factor(whole: Tensor, one: Tensor, here: Tensor, eps: float) -> tuple[float, str]:
    """The factor that distances ``here`` need beyond those of ``one`` process, and what is wrong with it, or "".

    Args:
        whole: distances in one process, of all tokens of the case.
        one: of the tokens of this rank.
        here: the same tokens, across ranks.
    """
    known = whole[whole.isfinite()]
    if len(known) and float(known.median()) > MISTRUST:
        return float(
            "inf"
        ), f"one process lies {float(known.median()):.2g} from the float64 oracle, which cannot judge it"
    if not len(here):
        return 0.0, ""
    floor = one.nan_to_num().clamp_min(typical(whole)).clamp_min(torch.finfo(torch.float64).tiny)
    excess = (here.nan_to_num() - EPS_ALLOWANCE * eps).clamp_min(0.0)
    factor = torch.where(excess > 0, excess / floor, 0.0)
    worst = int(factor.argmax())
    if float(factor[worst]) <= FACTOR:
        return float(factor[worst]), ""
    return float(factor[worst]), (
        f"token {worst} lies {float(here[worst]):.2e} from the float64 oracle, and in one process "
        f"{float(one[worst]):.2e}"
    )

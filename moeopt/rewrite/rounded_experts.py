"""The experts of a bank as codes, rounded by a method that looks at more than each block's largest weight.

One expert at a time: W_in by the rows that reach it, then W_out by what the *rounded* W_in makes of these rows, so that
W_out makes good what it can of both. An expert that hardly a row reaches has its scales searched alone.

Shape legend: N out, K in, M rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import WeightFormat
from moeopt.ir.weight_refs import ExpertRef
from moeopt.ops.activations import apply_gate
from moeopt.ops.gptq import gptq
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.options.quant_plan import GPTQ
from moeopt.rewrite.block_graph import GivenCodes
from moeopt.rewrite.expert_rows import ExpertRows, OneExpertsRows
from moeopt.rewrite.live_codes import shapes_of
from moeopt.rewrite.live_weights import LiveExpertWeights
from moeopt.rewrite.rounded_matrix import FEWEST, finite_moments


class RoundedExperts(NamedTuple):
    """The codes of a bank and their format."""

    format: BankFormat
    codes: GivenCodes


def rounded_experts(
    module: nn.Module, experts: list[ExpertRef], spec: ExpertsSpec, format: WeightFormat, method: str,
    rows: ExpertRows | None,
) -> RoundedExperts:  # fmt: skip
    """Codes of the floats that ``module`` holds.

    Args:
        module, experts, spec: where the floats are, and what they compute.
        format: what each matrix is rounded to.
        method: ``"search"`` or ``"gptq"``.
        rows: what reached the bank; None where nothing did, or nothing is known.

    Raises:
        UsageError: a weight holds NaN or infinity, or the rows make such numbers.
    """
    floats = LiveExpertWeights(module, experts, ("oi", "oi"))
    *ins, out = [MatrixFormat(format, shape, True) for shape in shapes_of(experts[0])]
    bank = BankFormat(len(experts), tuple(ins), out)
    names = [f"w_in_{i}" for i in range(len(ins))] + ["w_out"]
    tensors: dict[str, Tensor] = {}
    few = 0
    for e in range(len(experts)):
        reached = None if rows is None else rows.of(e, spec)
        enough = reached is not None and len(reached) >= FEWEST
        few += method == GPTQ and not enough
        made = _one_expert(floats, e, spec, format, method == GPTQ and enough, reached)
        for name, matrix, one in zip(names, (*ins, out), made, strict=True):
            for part in matrix.parts:
                tensor = getattr(one, part)
                key = f"{name}_{part}"
                if key not in tensors:
                    tensors[key] = tensor.new_empty((len(experts), *tensor.shape))
                tensors[key][e].copy_(tensor)
    return RoundedExperts(bank, GivenCodes(tensors, False, few))


def _one_expert(
    floats: LiveExpertWeights,
    e: int,
    spec: ExpertsSpec,
    format: WeightFormat,
    by_hessian: bool,
    rows: OneExpertsRows | None,
) -> list[QuantizedWeight]:
    """The matrices of expert ``e``, by GPTQ or with scales that are searched."""
    made: list[QuantizedWeight] = []
    hessian = None  # gate and up read the same rows

    def rounded(w_NK: Tensor, words: str, after: Callable[[Tensor], Tensor]) -> None:
        nonlocal hessian
        name = f"{words} of expert {e}"
        if rows is not None and by_hessian:
            hessian = rows.hessian(after) if hessian is None else hessian
            made.append(gptq(w_NK.detach(), format, finite_moments(hessian, name), name))
            return
        squares = finite_moments(rows.mean_squares(after), name) if rows is not None and len(rows) else None
        made.append(quantize(w_NK.detach(), format, name, search=True, squares_K=squares))

    for number, w_NK in enumerate(floats.w_in(e)):
        rounded(w_NK, f"w_in_{number}", lambda rows_MK: rows_MK)
    hessian = None
    rounded(floats.w_out(e), "w_out", _hidden([one.dequantize() for one in made], floats.b_in(e), spec))
    return made


def _hidden(w_in: list[Tensor], b_in: tuple[Tensor | None, ...], spec: ExpertsSpec) -> Callable[[Tensor], Tensor]:
    """What W_out is multiplied with, of rows (M, K) in float32."""

    def after(rows_MK: Tensor) -> Tensor:
        pairs = zip(w_in, b_in, strict=True)
        return apply_gate(
            tuple([F.linear(rows_MK, w, None if b is None else b.detach().float()) for w, b in pairs]), spec
        )

    return after

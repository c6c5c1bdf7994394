"""How near the kernel comes to the definition where codes of some kind meet rows of 8 bits: asked before it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moeopt.ir.bank_format import BankFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.native.call import NativeRun, call
from moeopt.ops.native.selfcheck import dyadic
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.reference import experts_reference
from moeopt.ops.rounded_rows import ROW_BLOCK, STEPS, rounded_rows

MOST = 512
"""Outputs of a matrix, and inner numbers, that are asked for: they are like the others."""
MOST_INPUTS = 4096
_TERMS = 32
"""Numbers of a row beside the largest of each block: with so few, sums of whole numbers are exact in float32."""

Ask = Callable[[Tensor, Tensor, Tensor, QuantizedExpertWeights, ExpertsSpec], Tensor]
"""x (T, H), ids (T, K), weights (T, K), the codes and the experts' function -> what a kernel gives, (T, D)."""


def rounded_error(run: NativeRun, isa: int, format: BankFormat) -> tuple[float, float]:
    """:func:`error_of` the kernel ``run``."""
    return error_of(functools.partial(_called, run, isa), format)


def _called(
    run: NativeRun, isa: int, x: Tensor, ids: Tensor, weights: Tensor, bank: QuantizedExpertWeights, spec: ExpertsSpec
) -> Tensor:
    return call(run, x, ids, weights, bank, spec, isa)


def error_of(ask: Ask, format: BankFormat) -> tuple[float, float]:
    """Of codes and rows made up here, of the formats and sizes of ``format``.

    What is rounded inside is exact before, so that no number lies between two steps, where float32 decides which it is.

    Returns:
        how far the kernel is from the definition, in eps of a row's length, and by how much rounding the rows moves a
        product, relative to its length: the worst of a single row and of several.

    Raises:
        Unfit: the kernel does not take the formats.
    """
    rng = torch.Generator().manual_seed(0)
    H, I = min(format.w_in[0].shape[1], MOST_INPUTS), min(format.w_out.shape[1], MOST)
    D, pairs = min(format.w_out.shape[0], MOST), len(format.w_in)
    ins = [QuantizedMatrices.of([dyadic(I, H, m.format, rng)]) for m in format.w_in]
    spec = ExpertsSpec(rows="separate" if pairs == 2 else "plain", activation="relu")
    bank = QuantizedExpertWeights(ins, QuantizedMatrices.of([dyadic(D, I, format.w_out.format, rng)])).reading("int8")
    w_IH, error, moved = ins[0][0].dequantize(torch.float64), 0.0, 0.0
    for T in (1, 5):
        x = torch.randint(-STEPS, STEPS + 1, (T, H), generator=rng) * (torch.rand(T, H, generator=rng) < _TERMS / H)
        x[:, ::ROW_BLOCK] = STEPS
        args = x / 32, torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1)
        want = experts_reference(*args, bank, spec).double()
        far = (ask(*args, bank, spec).double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
        error = max(error, float(far.max()) / torch.finfo(torch.float32).eps)
        row = torch.randn(T, H, generator=rng)
        exact = row.double() @ w_IH.T
        off = (rounded_rows(row).double() @ w_IH.T - exact).norm(dim=-1) / exact.norm(dim=-1)
        moved = max(moved, float(off.max()))
    return error, moved

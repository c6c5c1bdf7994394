"""The definition of ``moeopt::experts``: every other kernel must compute what this loop computes.

Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate, M rows of one turn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.quantized_bank import QuantizedExpertWeights, rounds_rows
from moeopt.ops.rounded_rows import rounded_rows
from moeopt.value_types import PyObject


def experts_reference(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec
) -> Tensor:
    """The equations of :mod:`moeopt.ir.specs`, one expert at a time; differentiable.

    Args:
        x_TH: tokens (T, H), any float dtype.
        ids_TK: chosen experts (T, K), an integer dtype. An id < 0 adds nothing; an id >= E is
            ``spec.out_of_range``; an id that a token names twice counts twice.
        weights_TK: routing weights (T, K), any float dtype.
        bank: the E experts' weights; cast to the compute dtype where they have another. Of codes whose products read
            rows of 8 bits they are not cast: rounded rows are multiplied in float32, or in float64 where that is the
            compute dtype, and the product is rounded to the compute dtype.
        spec: the function.

    Returns:
        (T, H_out) in ``spec.out_dtype``, else the dtype of x.
    """
    check(x_TH, ids_TK, weights_TK, bank, spec)
    compute, accum, out = dtypes(x_TH, spec)
    y_TH = x_TH.new_zeros(x_TH.shape[0], out_features(bank, spec), dtype=accum)
    for e, token_M, slot_M in _turns(ids_TK, spec):
        if e < 0 or (e >= bank.num_experts and spec.out_of_range == "nothing"):
            continue
        x_MH, w_M1 = x_TH[token_M], weights_TK[token_M, slot_M, None]
        if e >= bank.num_experts:
            term_MH = x_MH * w_M1
        elif spec.weight_on == "input":
            term_MH = one_expert((x_MH * w_M1).to(compute), bank, e, spec)
        else:
            term_MH = one_expert(x_MH.to(compute), bank, e, spec) * w_M1
        y_TH = y_TH.index_add(0, token_M, term_MH.to(accum))
    return y_TH.to(out)


def one_expert(r_MH: Tensor, bank: ExpertWeights, e: int, spec: ExpertsSpec) -> Tensor:
    """Expert ``e`` on the rows ``r_MH`` (already in the compute dtype): (M, H_out)."""
    pairs = zip(bank.w_in(e), bank.b_in(e), strict=True)
    linear = _rounded_linear if rounds_rows(bank) else _linear
    h = tuple([linear(r_MH, w, b, spec.w_in_layout) for w, b in pairs])
    o_MH = linear(apply_gate(h, spec), bank.w_out(e), bank.b_out(e), spec.w_out_layout)
    return rms_norm(o_MH, bank.norm(e), spec)


def rms_norm(o_MH: Tensor, norm_H: Tensor | None, spec: ExpertsSpec) -> Tensor:
    """``F.rms_norm`` over the last dimension when the spec asks for one; float16 and bfloat16 are upcast inside."""
    if spec.out_norm_eps is None:
        return o_MH
    weight_H = None if norm_H is None else norm_H.to(o_MH.dtype)
    return F.rms_norm(o_MH, (o_MH.shape[-1],), weight_H, spec.out_norm_eps)


def dtypes(x: Tensor, spec: ExpertsSpec | RowFunction) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The compute, accumulator and output dtypes that ``spec`` means for this ``x``."""
    compute = getattr(torch, spec.compute_dtype) if spec.compute_dtype else x.dtype
    out = getattr(torch, spec.out_dtype) if spec.out_dtype else x.dtype
    return compute, getattr(torch, spec.accum_dtype) if spec.accum_dtype else out, out


def out_features(bank: PyObject, spec: ExpertsSpec | RowFunction) -> int:
    """The width of the result: W_out's output dimension."""
    if isinstance(spec, RowFunction):
        return spec.body.out_features
    if isinstance(bank, QuantizedExpertWeights):
        return bank.out_features
    return int(bank.w_out(0).shape[0 if spec.w_out_layout == "oi" else 1])


def check(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> None:
    """Raise a ``UsageError`` on arguments that no kernel could give a meaning."""
    if x_TH.dim() != 2 or ids_TK.dim() != 2 or ids_TK.shape[0] != x_TH.shape[0] or weights_TK.shape != ids_TK.shape:
        raise UsageError(
            f"experts: x is {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, weights {tuple(weights_TK.shape)}; "
            "they must be (T, H), (T, K) and (T, K): flatten batch and sequence first"
        )
    if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        raise UsageError(f"experts: ids have dtype {ids_TK.dtype}; pass the integer ids that top-k returned")
    if spec.out_of_range == "identity" and out_features(bank, spec) != x_TH.shape[1]:
        raise UsageError(
            f"experts: out_of_range='identity' adds x of width {x_TH.shape[1]} to an output of width "
            f"{out_features(bank, spec)}; such a block needs out_of_range='nothing'"
        )


def _turns(ids_TK: Tensor, spec: ExpertsSpec) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) in the order of the sum: all slots at once, or slot by slot; experts ascending."""
    slots = list(range(ids_TK.shape[1]))
    for columns in [slots] if spec.combine == "expert" else [[k] for k in slots]:
        picked = ids_TK[:, columns]
        for e in picked.unique().tolist():
            token_M, column_M = torch.where(picked == e)
            yield e, token_M, column_M + columns[0]


def _linear(x: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
    w = w.to(x.dtype)
    return F.linear(x, w if layout == "oi" else w.t(), None if b is None else b.to(x.dtype))


def _rounded_linear(x: Tensor, w: Tensor, b: Tensor | None, layout: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, b = rounded_rows(x, dtype=wide), None if b is None else b.to(x.dtype)
    return _linear(rows, w, b, layout).to(x.dtype)

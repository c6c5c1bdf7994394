"""Whose weights are whose: of a call of an experts' op, the tensors of each expert, floats or codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.ops import quantized_experts as quantized
from moeopt.ops.experts import decode, unflatten
from moeopt.value_types import FxTarget, PyObject


def takes_experts(op: FxTarget) -> bool:
    """Whether an op runs the experts that its second argument names; functions of a row are unrolled in a bundle."""
    return op in _BY_EXPERT


def tensors_by_expert(op: FxTarget, weights: Sequence[Any]) -> list[list[Tensor]] | None:
    """By expert, the matrices that one call reads.

    Args:
        op: one that :func:`takes_experts`.
        weights: its arguments after x, ids and weights.

    Returns:
        None where they are no bank (the op says so at the call), or where an expert's numbers do not lie one beside the
        other, so that the pages between its first and its last are others' too.
    """
    try:
        found = _BY_EXPERT[op](*weights)
    except Exception:  # of a bundle that somebody else wrote: lists of any lengths, of anything
        return None
    return found if all(_lies_whole(tensor) for tensors in found for tensor in tensors) else None


def _of_floats(*given: PyObject) -> list[list[Tensor]]:
    *lists, spec = given
    bank = unflatten([part or [] for part in lists], decode(spec))
    return [[*bank.w_in(e), bank.w_out(e)] for e in range(bank.num_experts)]


def _of_codes(*given: PyObject) -> list[list[Tensor]]:
    *lists, _, formats = given
    bank = quantized.unflatten([part or [] for part in lists], quantized.decode_formats(formats))
    held = [[m[e] for m in (*bank.w_in_q, bank.w_out_q)] for e in range(bank.num_experts)]
    return [[t for w in of for t in (w.codes, w.scales, w.zeros) if t is not None] for of in held]


_BY_EXPERT: dict[FxTarget, Callable[..., list[list[Tensor]]]] = {
    torch.ops.moeopt.experts.default: _of_floats,
    torch.ops.moeopt.quantized_experts.default: _of_codes,
}


def _lies_whole(tensor: Tensor) -> bool:
    """Whether no bytes of anything else lie between the first and the last of a tensor, in whatever order they are."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return not tensor.numel() or last + 1 == tensor.numel()

"""``torch.ops.moeopt.experts`` itself: what tracers see of a call, its kernel, its shapes and its gradient.

The schema is told in :mod:`moeopt.ops.experts`, which calls it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.ops.expert_weights import how_they_lie
from moeopt.ops.experts import Lists, decode, gradients_of_lists, run_kernel, unflatten
from moeopt.ops.gradients import fits, lists_gradients
from moeopt.ops.op_registration import BANK_LISTS, register_experts_op
from moeopt.ops.reference import experts_reference
from moeopt.ops.unfit import Unfit
from moeopt.value_types import PyObject

MOST_WEIGHTS = 32
"""Weights of a call of which it is known how they lie: compiled code calls the op with the same ones each time."""
MOST_BANKS = 256
"""Ways in which the weights of calls lie that are known."""

_calls: dict[PyObject, dict[PyObject, PyObject]] = {}  # addresses and no tensor: what lies otherwise is another entry


def _experts(
    x: Tensor, ids: Tensor, weights: Tensor,
    w_in: list[Tensor], w_out: list[Tensor], b_in: list[Tensor], b_out: list[Tensor], norm: list[Tensor], spec: str,
) -> Tensor:  # fmt: skip
    known, lists = decode(spec), (w_in, w_out, b_in, b_out, norm)
    with torch.no_grad():
        bank: PyObject = unflatten(lists, known)
        if x.is_cpu:
            bank.remembered = functools.partial(_remembered, lists, spec)
        return run_kernel(x, ids, weights, bank, known)


def _remembered(lists: Lists, spec: str, rows: int) -> tuple[dict[PyObject, PyObject], list[Tensor]] | None:
    """What a kernel has worked out of weights that lie as these do, for it to fill, and the weights.

    None of many, where it is sooner to look at the experts that the ids name.
    """
    del rows
    tensors = [t for part in lists for t in part or ()]
    if len(tensors) > MOST_WEIGHTS:
        return None
    lie = (spec, *how_they_lie(tensors))
    calls = _calls.get(lie)
    if calls is None:
        if len(_calls) >= MOST_BANKS:
            _calls.clear()
        calls = _calls[lie] = {}
    return calls, tensors


def _experts_fake(
    x: Tensor, ids: Tensor, weights: Tensor,
    w_in: list[Tensor], w_out: list[Tensor], b_in: list[Tensor], b_out: list[Tensor], norm: list[Tensor], spec: str,
) -> Tensor:  # fmt: skip
    known = decode(spec)
    dtype = getattr(torch, known.out_dtype) if known.out_dtype else x.dtype
    return x.new_empty(x.shape[0], w_out[0].shape[-2 if known.w_out_layout == "oi" else -1], dtype=dtype)


def _backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor,
    w_in: list[Tensor], w_out: list[Tensor], b_in: list[Tensor], b_out: list[Tensor], norm: list[Tensor], spec: str,
    needs: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of those of [x, weights, *w_in, *w_out, *b_in, *b_out, *norm] that ``needs`` indexes.

    What is not written out recomputes the reference with gradients on. Stacked weights are taken apart into leaves
    first: the gradient of ``w[e]`` with respect to a whole stack would be E stacks.
    """
    if fits(x, decode(spec)):
        with contextlib.suppress(Unfit):
            return lists_gradients(grad, x, ids, weights, (w_in, w_out, b_in, b_out, norm), decode(spec), needs)
    known, E = decode(spec), w_out[0].shape[0] if w_out[0].dim() == 3 else 0
    lists = [w_in, w_out, b_in, b_out, norm]
    whole = [x, weights, *(t for part in lists for t in part)]
    leaves = [[x.detach()], [weights.detach()]]
    leaves += [list(t.detach().unbind(0)) if E and t.numel() else [t.detach()] * max(E, 1) for t in whole[2:]]
    wanted = [leaf.requires_grad_() for i in needs for leaf in leaves[i]]
    rest = iter(leaves[2:])
    bank = unflatten([[leaf for _ in part for leaf in next(rest)] for part in lists], known)
    totals = [torch.zeros_like(whole[i], memory_format=torch.contiguous_format) for i in needs]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = experts_reference(leaves[0][0], ids, leaves[1][0], bank, known)
        if not y.requires_grad:  # no expert was hit
            return totals
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
    for i, total in zip(needs, totals, strict=True):
        for piece in total.unbind(0) if E and i > 1 else [total]:
            grad_of_piece = next(found)
            if grad_of_piece is not None:
                piece.copy_(grad_of_piece)
    return totals


def _backward_fake(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor,
    w_in: list[Tensor], w_out: list[Tensor], b_in: list[Tensor], b_out: list[Tensor], norm: list[Tensor], spec: str,
    needs: list[int],
) -> list[Tensor]:  # fmt: skip
    whole = [x, weights, *w_in, *w_out, *b_in, *b_out, *norm]
    return [torch.empty_like(whole[i], memory_format=torch.contiguous_format) for i in needs]


def _gradients(
    sizes: list[int], texts: Sequence[str], grad: Tensor, saved: list[Tensor], needs: list[int]
) -> list[Tensor]:
    (spec,) = texts
    return gradients_of_lists(sizes, spec, grad, saved, needs)


register_experts_op(
    "experts", BANK_LISTS, ["spec"],
    kernel=_experts, fake=_experts_fake, backward=_backward, backward_fake=_backward_fake, gradients=_gradients,
)  # fmt: skip

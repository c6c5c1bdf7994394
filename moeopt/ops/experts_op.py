"""``torch.ops.moeopt.experts`` itself: what tracers see of a call, its kernel, its shapes and its gradient.

The schema is told in :mod:`moeopt.ops.experts`, which calls it.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from moeopt.ops.expert_weights import how_they_lie
from moeopt.ops.experts import Lists, decode, gradients_of_lists, run_kernel, unflatten
from moeopt.ops.forward_mode import refusing_tangents
from moeopt.ops.gradients import fits, lists_gradients
from moeopt.ops.reference import experts_reference
from moeopt.ops.unfit import Unfit
from moeopt.value_types import PyObject

MOST_WEIGHTS = 32
"""Weights of a call of which it is known how they lie: compiled code calls the op with the same ones each time."""
MOST_BANKS = 256
"""Ways in which the weights of calls lie that are known."""

_calls: dict[PyObject, dict[PyObject, PyObject]] = {}  # addresses and no tensor: what lies otherwise is another entry

_WEIGHTS = "Tensor[] w_in, Tensor[] w_out, Tensor[]? b_in, Tensor[]? b_out, Tensor[]? norm"
# optional, though an absent part is an empty list here: AOTInductor hands an empty list over as None
_ARGS = f"Tensor x, Tensor ids, Tensor weights, {_WEIGHTS}"
_LIB = torch.library.Library("moeopt", "FRAGMENT")
_LIB.define(f"experts({_ARGS}, str spec) -> Tensor")
_LIB.define(f"experts_backward(Tensor grad, {_ARGS}, str spec, int[] needs) -> Tensor[]")


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


def _setup_context(ctx: PyObject, inputs: tuple[PyObject, ...], output: Tensor) -> None:
    x, ids, weights, *lists, spec = inputs
    ctx.save_for_backward(x, ids, weights, *(t for part in lists for t in part))
    ctx.sizes = [len(part) for part in lists]
    ctx.spec = spec


def _gradients(ctx: PyObject, grad: Tensor) -> tuple[PyObject, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "moeopt::experts has no second derivative (create_graph=True); take it of the original model instead"
        )
    wants_x, _, wants_weights, *wants_lists, _ = ctx.needs_input_grad
    wants = [wants_x, wants_weights, *(w for part in wants_lists for w in part)]
    needs = [i for i, wanted in enumerate(wants) if wanted]
    found = iter(gradients_of_lists(ctx.sizes, ctx.spec, grad, list(ctx.saved_tensors), needs))
    grads = iter([next(found) if wanted else None for wanted in wants])
    grad_x, grad_weights = next(grads), next(grads)
    return grad_x, None, grad_weights, *([next(grads) for _ in range(size)] for size in ctx.sizes), None


for _key in ("CPU", "CUDA"):
    _LIB.impl("experts", refusing_tangents("experts", _experts), _key)
    _LIB.impl("experts_backward", _backward, _key)
torch.library.register_fake("moeopt::experts", _experts_fake, lib=_LIB)
torch.library.register_fake("moeopt::experts_backward", _backward_fake, lib=_LIB)
torch.library.register_autograd("moeopt::experts", _gradients, setup_context=_setup_context, lib=_LIB)

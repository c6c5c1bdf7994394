"""``moeopt::route``: logits to expert ids and routing weights, for the runtimes that take logits.

Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.specs import RouterSpec
from moeopt.ops.forward_mode import refusing_tangents
from moeopt.value_types import PyObject


def route(logits_TE: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Choose ``spec.top_k`` experts for each token, and their weights.

        softmax_topk:  p = softmax(logits over E);  weights, ids = topk(p)
        topk_softmax:  l, ids = topk(logits);       weights = softmax(l over K)

    then, if ``spec.renormalize``, weights / sum(weights).

    Args:
        logits_TE: router logits (T, E), any float dtype; T may be 0.
        spec: the score; ``spec.dtype`` is the dtype of the softmax, None that of the logits.

    Returns:
        ids (T, K) int64 and weights (T, K) in the dtype of the softmax, both sorted by falling weight.

    Raises:
        UsageError: the logits are not (T, ``spec.num_experts``).
    """
    if logits_TE.dim() != 2 or logits_TE.shape[1] != spec.num_experts:
        raise UsageError(
            f"route: logits are {tuple(logits_TE.shape)}; they must be (T, {spec.num_experts}), as the RouterSpec says"
        )
    ids_TK, weights_TK = torch.ops.moeopt.route(logits_TE, spec.score, spec.top_k, spec.renormalize, spec.dtype or "")
    return ids_TK, weights_TK


def route_reference(logits_TE: Tensor, score: str, top_k: int, renormalize: bool, dtype: str) -> tuple[Tensor, Tensor]:
    """The definition of :func:`route`, in eager PyTorch; differentiable."""
    computed_in = getattr(torch, dtype) if dtype else logits_TE.dtype
    if score == "softmax_topk":
        probs_TE = torch.softmax(logits_TE, dim=-1, dtype=computed_in)
        weights_TK, ids_TK = torch.topk(probs_TE, top_k, dim=-1)
    else:
        kept_TK, ids_TK = torch.topk(logits_TE, top_k, dim=-1)
        weights_TK = torch.softmax(kept_TK, dim=-1, dtype=computed_in)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK


_LIB = torch.library.Library("moeopt", "FRAGMENT")
_LIB.define("route(Tensor logits, str score, int top_k, bool renormalize, str dtype) -> (Tensor, Tensor)")


def _route_fake(logits: Tensor, score: str, top_k: int, renormalize: bool, dtype: str) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(
        shape, dtype=getattr(torch, dtype) if dtype else logits.dtype
    )


def _setup_context(ctx: PyObject, inputs: tuple[PyObject, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.rest = inputs[1:]
    ctx.mark_non_differentiable(output[0])


def _gradients(ctx: PyObject, _: Tensor, grad_TK: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Differentiates the same equations with the chosen ids held fixed."""
    logits_TE, ids_TK = ctx.saved_tensors
    score, _, renormalize, dtype = ctx.rest
    computed_in = getattr(torch, dtype) if dtype else logits_TE.dtype
    kept_TK = logits_TE.to(computed_in).gather(1, ids_TK)
    if score == "softmax_topk":
        kept_TK = kept_TK - torch.logsumexp(logits_TE.to(computed_in), dim=1, keepdim=True)
        probs_TK = kept_TK.exp()
    else:
        probs_TK = torch.softmax(kept_TK, dim=1)
    total_T1 = probs_TK.sum(1, keepdim=True)
    if renormalize:
        shares_TK = probs_TK / total_T1
        grad_TK = (grad_TK - (grad_TK * shares_TK).sum(1, keepdim=True)) / total_T1
    inner_TK = probs_TK * grad_TK
    grad_TE = torch.zeros_like(logits_TE, dtype=computed_in).scatter(1, ids_TK, inner_TK)
    if score == "softmax_topk":
        grad_TE = grad_TE - torch.softmax(logits_TE, 1, dtype=computed_in) * inner_TK.sum(1, keepdim=True)
    else:
        grad_TE = grad_TE.scatter(1, ids_TK, inner_TK - probs_TK * inner_TK.sum(1, keepdim=True))
    return grad_TE.to(logits_TE.dtype), None, None, None, None


for _key in ("CPU", "CUDA"):
    _LIB.impl("route", refusing_tangents("route", route_reference), _key)
torch.library.register_fake("moeopt::route", _route_fake, lib=_LIB)
torch.library.register_autograd("moeopt::route", _gradients, setup_context=_setup_context, lib=_LIB)

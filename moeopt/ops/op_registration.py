"""How the custom ops of experts are registered: schema, kernels, shapes for tracers, and gradients.

    name(Tensor x, Tensor ids, Tensor weights, <lists of tensors>, <texts>) -> Tensor
    name_backward(Tensor grad, <the same>, int[] needs) -> Tensor[]

``needs`` indexes [x, weights, *the tensors of the lists]: whose gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeopt.ops.forward_mode import OpImpl, refusing_tangents
from moeopt.value_types import PyObject

GradientsOfLists = Callable[[list[int], Sequence[str], Tensor, list[Tensor], list[int]], Sequence[Tensor]]
"""From the lengths of the lists, the texts, the gradient of the result, [x, ids, weights, *tensors] and ``needs`` to
the gradients that ``needs`` asks for."""

BANK_LISTS = "Tensor[] w_in, Tensor[] w_out, Tensor[]? b_in, Tensor[]? b_out, Tensor[]? norm"
"""The weights of a bank. Parts that may be absent are optional, though an absent one is an empty list here: AOTInductor
hands an empty list over as None."""

_LIB = torch.library.Library("moeopt", "FRAGMENT")


def register_experts_op(
    name: str, lists: str, texts: Sequence[str], *, kernel: OpImpl, fake: OpImpl, backward: OpImpl,
    backward_fake: OpImpl, gradients: GradientsOfLists,
) -> None:  # fmt: skip
    """Register ``moeopt::name`` and ``moeopt::name_backward``.

    Args:
        lists: the schema of the lists of tensors.
        texts: names of the string arguments behind them.
        kernel, backward: the two ops on a CPU and on CUDA.
        fake, backward_fake: the shapes and dtypes of their results.
        gradients: what autograd calls for the backward pass.
    """
    arguments = ", ".join(["Tensor x, Tensor ids, Tensor weights", lists, *(f"str {text}" for text in texts)])
    _LIB.define(f"{name}({arguments}) -> Tensor")
    _LIB.define(f"{name}_backward(Tensor grad, {arguments}, int[] needs) -> Tensor[]")
    for key in ("CPU", "CUDA"):
        _LIB.impl(name, refusing_tangents(name, kernel), key)
        _LIB.impl(f"{name}_backward", backward, key)
    torch.library.register_fake(f"moeopt::{name}", fake, lib=_LIB)
    torch.library.register_fake(f"moeopt::{name}_backward", backward_fake, lib=_LIB)
    derivative = _derivative(f"moeopt::{name}", gradients)
    torch.library.register_autograd(f"moeopt::{name}", derivative, setup_context=_setup_context, lib=_LIB)


def _setup_context(ctx: PyObject, inputs: tuple[PyObject, ...], output: Tensor) -> None:
    x, ids, weights, *rest = inputs
    lists = [part for part in rest if not isinstance(part, str)]
    ctx.save_for_backward(x, ids, weights, *(t for part in lists for t in part))
    ctx.sizes, ctx.texts = [len(part) for part in lists], rest[len(lists) :]


def _derivative(op: str, gradients: GradientsOfLists) -> OpImpl:
    def derivative(ctx: PyObject, grad: Tensor) -> tuple[PyObject, ...]:
        refuse_second_derivative(op)
        wants_x, _, wants_weights, *wants_rest = ctx.needs_input_grad
        wants = [wants_x, wants_weights, *(w for part in wants_rest[: len(ctx.sizes)] for w in part)]
        needs = [i for i, wanted in enumerate(wants) if wanted]
        found = iter(gradients(ctx.sizes, ctx.texts, grad, list(ctx.saved_tensors), needs))
        grads = iter([next(found) if wanted else None for wanted in wants])
        grad_x, grad_weights = next(grads), next(grads)
        of_lists = [[next(grads) for _ in range(size)] for size in ctx.sizes]
        return grad_x, None, grad_weights, *of_lists, *(None for _ in ctx.texts)

    return derivative


def refuse_second_derivative(op: str) -> None:
    """``RuntimeError`` in a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative (create_graph=True); take it of the original model instead")


def gradients_by_autograd(y: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of ``inputs`` where ``y`` was computed from them with gradients on; zeros for those it ignores."""
    found = torch.autograd.grad(y, inputs, grad, allow_unused=True) if y.requires_grad else [None] * len(inputs)
    return [torch.zeros_like(w) if g is None else g.clone() for w, g in zip(inputs, found, strict=True)]

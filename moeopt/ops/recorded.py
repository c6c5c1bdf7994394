"""A call of an op whose gradient is needed, recorded by one ``autograd.Function`` around the kernel.

A custom op records itself too, and takes a few hundred microseconds of Python for each call: many small blocks compute
for less. And a model that is run without ``torch.no_grad()`` records every call, whether or not anybody asks for a
gradient. So the custom op is for tracers, and eager code comes here, where the kernel reads the bank as it does
without gradients.

Shape legend: T tokens, E experts, K chosen per token, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.bank_gradients import HeldAt
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights
from moeopt.ops.gradients import fits, held_gradients
from moeopt.ops.op_registration import refuse_second_derivative
from moeopt.ops.reference import experts_reference
from moeopt.ops.unfit import Unfit
from moeopt.value_types import PyObject

KernelCall = Callable[[], tuple[Tensor, "Tensor | None"]]
"""Computes y, and what is kept of h for the backward pass: see ``native.hidden.Hidden``."""
Gradients = Callable[[Tensor, list[Tensor], list[int], "Tensor | None"], Sequence["Tensor | None"]]
"""From the gradient of y, [x, ids, weights, *held], ``needs`` and what was kept of h to the gradients of those of
[x, weights, *held] that ``needs`` indexes."""

MOST = 16
"""Experts up to which all are read at once sooner than those that are named, one by one."""
FEW = 4096
"""Ids up to which Python finds the experts that they name sooner than PyTorch."""


def recorded(
    op: str, run: KernelCall, gradients: Gradients, x: Tensor, ids: Tensor, weights: Tensor, held: Sequence[Tensor]
) -> Tensor:  # fmt: skip
    """``run()``, with ``gradients`` as its derivative by x, the routing weights, and what is ``held`` of the bank.

    Args:
        op: its name, for the error of who asks for a second derivative.
        run: computes y from the same x, ids, weights and bank, in memory of its own.
        held: the tensors that a gradient may reach; changed in place before the backward pass, they raise.
    """
    y: Tensor = _Recorded.apply(op, run, gradients, x, ids, weights, *held)  # type: ignore[no-untyped-call]
    return y


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: PyObject, op: str, run: KernelCall, gradients: Gradients, *tensors: Tensor) -> Tensor:
        y, kept = run()
        # of what was made in torch.inference_mode() a copy may be saved; the original keeps x[rows], which is one
        ctx.save_for_backward(*[t.clone() if t.is_inference() else t for t in tensors], kept)
        ctx.op, ctx.gradients = op, gradients
        return y

    @staticmethod
    def backward(ctx: PyObject, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(ctx.op)
        wants_x, _, *wants = ctx.needs_input_grad[3:]
        needs = [i for i, wanted in enumerate((wants_x, *wants)) if wanted]
        *saved, kept = _saved(ctx)
        found = dict(zip(needs, ctx.gradients(grad, saved, needs, kept), strict=True))
        return None, None, None, found.get(0), None, *(found.get(i) for i in range(1, 1 + len(wants)))


def _saved(ctx: PyObject) -> list[PyObject]:
    try:
        return list(ctx.saved_tensors)
    except RuntimeError as err:
        if "inplace operation" not in str(err):
            raise
        raise RuntimeError(
            f"{err}\n{ctx.op} reads its tokens, routing weights and experts again in the backward pass, where the "
            "original may have copies of some: change them after it, or write h = h + moe(h) in the place of "
            "h += moe(h)"
        ) from err


Rebuild = Callable[[Sequence[PyObject]], ExpertWeights]
"""The bank of tensors that stand for those that were held; or of their places, as ``HeldAt``."""


class _Looked:
    """A bank for one call, all of whose weights were looked at in it: a kernel need not look again."""

    def __init__(self, bank: ExpertWeights, remembered: PyObject) -> None:
        self._bank, self.remembered = bank, lambda rows: remembered

    def __getattr__(self, name: str) -> PyObject:
        return getattr(self._bank, name)


def separate_experts(
    bank: ExpertWeights, ids: Tensor, weights: Tensor, skip_idle: bool
) -> tuple[Sequence[Tensor], Rebuild, ExpertWeights]:
    """Each tensor once of the experts that a gradient reaches, how they are a bank again, and the bank for this call.

    Args:
        bank: E experts of separate weights. One that has a ``whole()`` is read at once.
        ids: (T, K) of the call.
        weights: (T, K) of the call.
        skip_idle: whether experts that no token reaches have no gradient: then the others alone are held, and those
            that an id of weight 0 names are held detached. Else their gradient is zeros, and all are held.
    """
    E = bank.num_experts
    named, hit = named_and_hit(ids, weights, E) if skip_idle else (range(E), range(E))
    # a tensor of both kinds is held as that of the first; where no expert is named, one tells how wide y is
    order = [*hit, *(e for e in named if e not in hit)] or [0]
    whole = getattr(bank, "whole", None)
    found = whole() if whole is not None and (len(order) == E or E <= MOST) else None
    if found is None:
        return *_read_one_by_one(bank, order, hit), bank
    looked, experts = found
    tensors, for_call = looked[1], cast(ExpertWeights, _Looked(bank, looked))
    if not skip_idle:
        return tensors, experts.listed, for_call
    reached = {n: tensors[n] for e in hit for n in experts.of[e]}
    others = {n: tensors[n].detach() for e in order[len(hit) :] for n in experts.of[e] if n not in reached}
    numbers, P = (*reached, *others), len(tensors)

    def rebuild(held: Sequence[PyObject]) -> ExpertWeights:
        placed: list[PyObject] = [None] * P
        for n, tensor in zip(numbers, held, strict=True):
            placed[n] = tensor
        listed: ExpertWeights = experts.listed_as(placed, [e if e in named else order[0] for e in range(E)])
        return listed

    return [*reached.values(), *others.values()], rebuild, for_call


def _read_one_by_one(bank: ExpertWeights, order: list[int], hit: Collection[int]) -> tuple[list[Tensor], Rebuild]:
    held: list[Tensor] = []
    places: dict[int, int] = {}
    parts: dict[int, list[list[int | None]]] = {}

    def place(tensor: Tensor | None, reached: bool) -> int | None:
        if tensor is None:
            return None
        at = places.setdefault(id(tensor), len(held))
        if at == len(held):
            held.append(tensor if reached else tensor.detach())
        return at

    alive = []  # an address names one tensor only while that is kept
    for e in order:
        read = (bank.w_in(e), (bank.w_out(e),), bank.b_in(e), (bank.b_out(e),), (bank.norm(e),))
        alive.append(read)
        parts[e] = [[place(t, e in hit) for t in part] for part in read]

    def rebuild(tensors: Sequence[PyObject]) -> ListExpertWeights:
        experts = [parts.get(e, parts[order[0]]) for e in range(bank.num_experts)]

        def column(part: int, index: int) -> list[PyObject]:
            at = [one[part][index] for one in experts]
            return [None if n is None else tensors[n] for n in at]

        pairs = range(len(experts[0][0]))
        return ListExpertWeights(
            [column(0, i) for i in pairs], column(1, 0), [column(2, i) for i in pairs], column(3, 0), column(4, 0)
        )

    return held, rebuild


def gradients_of(rebuild: Rebuild, spec: ExpertsSpec) -> Gradients:
    """Those that are written out; of what they do not know, the definition again, with gradients on.

    Both are of the experts that ``rebuild`` makes of what was held.
    """

    def gradients(grad: Tensor, saved: list[Tensor], needs: list[int], kept: Tensor | None) -> list[Tensor]:
        if fits(saved[0], spec):
            bank = rebuild([HeldAt(n) for n in range(len(saved) - 3)])
            with contextlib.suppress(Unfit):
                return held_gradients(grad, saved, bank, spec, needs, kept)
        ids = saved.pop(1)
        leaves = [t.detach() for t in saved]
        wanted = [leaves[i].requires_grad_() for i in needs]
        with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
            y = experts_reference(leaves[0], ids, leaves[1], rebuild(leaves[2:]), spec)
            found = torch.autograd.grad(y, wanted, grad, allow_unused=True) if y.requires_grad else [None] * len(wanted)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    return gradients


def named_and_hit(ids: Tensor, weights: Tensor, experts: int) -> tuple[set[int], set[int]]:
    """The experts that ids name, and those of them that have a weight other than 0 from a token."""
    if ids.numel() <= FEW:
        pairs = list(zip(ids.flatten().tolist(), weights.detach().flatten().tolist(), strict=True))
        named, hit = {e for e, _ in pairs}, {e for e, w in pairs if w != 0}
    else:
        named, hit = (set(found.unique().tolist()) for found in (ids, ids[weights.detach() != 0]))
    every = range(experts)
    return {e for e in named if e in every}, {e for e in hit if e in every}

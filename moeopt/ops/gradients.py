"""Gradients of the op that are written out, for the lists of the custom op and for tensors that a node holds.

Shape legend: T tokens, E experts, K chosen per token, H hidden, D width of y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.bank_gradients import listed_parts, parts_of_lists, parts_of_stacks
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.experts_backward import experts_gradients


def fits(x: Tensor, spec: ExpertsSpec) -> bool:
    """Whether ``experts_gradients`` knows the function; else the definition is recorded and differentiated."""
    return x.is_cpu and spec.out_norm_eps is None


def lists_gradients(
    grad_TD: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, lists: Sequence[Sequence[Tensor]],
    spec: ExpertsSpec, needs: Sequence[int], kept: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of those of [x, weights, *lists] that ``needs`` indexes; ``lists`` are those of the op."""
    tensors, wanted = [t for part in lists for t in part], {i - 2 for i in needs if i > 1}
    call = grad_TD, x_TH, ids_TK, weights_TK
    wants = 0 in needs, 1 in needs
    totals: dict[int, Tensor] = {}
    if lists[1][0].dim() == 3:
        parts, stacks = parts_of_stacks(lists, wanted, spec)
        found = experts_gradients(*call, parts, spec, wants, kept)
        totals = {n: part.finish() for n, part in stacks.items()}
    else:
        found = experts_gradients(*call, parts_of_lists(lists, wanted, totals, spec), spec, wants, kept)
    return _in_order(found, totals, tensors, needs)


def held_gradients(
    grad_TD: Tensor, saved: Sequence[Tensor], bank: ExpertWeights, spec: ExpertsSpec, needs: Sequence[int],
    kept: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of those of [x, weights, *held] that ``needs`` indexes.

    Args:
        saved: x, ids, the routing weights, and what was held of the bank.
        bank: hands out a ``HeldAt`` in the place of each of the held tensors.
    """
    x_TH, ids_TK, weights_TK, *held = saved
    totals: dict[int, Tensor] = {}
    parts = listed_parts(bank, held, {i - 2 for i in needs if i > 1}, totals, spec)
    found = experts_gradients(grad_TD, x_TH, ids_TK, weights_TK, parts, spec, (0 in needs, 1 in needs), kept)
    return _in_order(found, totals, held, needs)


def _in_order(
    found: tuple[Tensor | None, Tensor | None], totals: dict[int, Tensor], tensors: Sequence[Tensor],
    needs: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients as ``needs`` asks for them; zeros of what no token reached."""
    every = [found[i] if i < 2 else totals.get(i - 2) for i in needs]
    return [torch.zeros_like(tensors[i - 2]) if g is None else g for i, g in zip(needs, every, strict=True)]

"""Fresh logits for a router, and how far its answers are from those of a RouterSpec."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from moeopt.capture.op_kinds import op_name
from moeopt.ir.specs import RouterSpec
from moeopt.ops.route import route
from moeopt.value_types import PyObject

EPS64 = torch.finfo(torch.float64).eps


def widens(node: fx.Node) -> bool:
    """A softmax that takes 16-bit logits and gives float32 (CUDA's), which refuses float64."""
    return op_name(node) == "_softmax" and len(node.args) > 2 and node.args[2] is True


def is_floating(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is None or bool(dtype.is_floating_point)


def fresh_logits(tokens: int, width: int, largest: float) -> Iterator[Tensor]:
    """Logits of every sort: ordinary first, then tiny, far from zero on both sides, one favourite, of all sizes."""
    generator = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return torch.randn(tokens, width, generator=generator)

    yield draw()
    yield draw() * 3
    yield draw() * 0.01
    yield draw() * 12
    yield draw() * 3 - 60
    yield draw() * 3 + 200
    yield draw() + 20 * (torch.arange(width) == width // 2)
    yield draw() * 10.0 ** torch.randint(
        -2, round(math.log10(min(largest, 1e9))) - 1, (tokens, width), generator=generator
    )


def holds_value(value: PyObject, want: Tensor, axis: int) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != want.numel():
        return False
    if value.dim() <= axis or value.shape[axis] != want.shape[1]:
        axis = value.dim() - 1
    got = value.movedim(axis, -1)
    if got.shape[-1] != want.shape[1]:
        return False
    slack = 4 * torch.finfo(value.dtype).eps * (1 - want.log()) * want
    return bool(((got.reshape(want.shape).double() - want).abs() <= slack).all())


def dense_table(ids: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(T, E) weights and choices; an id beyond the experts is dropped, one named twice is not a number."""
    ids = ids.clamp(max=width)
    count = torch.zeros(len(ids), width + 1, dtype=torch.float64).scatter_add(1, ids, torch.ones_like(weights))
    table = torch.zeros(len(ids), width + 1, dtype=torch.float64).scatter(1, ids, weights)
    table = torch.where(count > 1, torch.nan, table)
    return table[:, :width], count[:, :width] > 0


def compare_routing(
    got: tuple[Tensor, Tensor, Tensor], spec: RouterSpec, eps: float, budget: float
) -> tuple[Tensor, Tensor]:
    """(T,) which tokens the spec routes as (logits, ids, weights) say, and which differ by a tie alone.

    Each weight may be off by ``budget`` roundings of itself and of its logarithm (log_softmax and exp); a choice by
    experts whose logits the softmax rounds to one probability.
    """
    logits_TE, ids, weights = got
    table, chosen = dense_table(ids, weights, spec.num_experts)
    want_ids, want = route(logits_TE, spec)
    ref, picked = dense_table(want_ids, want.double(), spec.num_experts)
    wide_TE = logits_TE.double()
    slack = max(budget * eps, 64 * EPS64) * (1 - ref.clamp(min=1e-300).log()) * ref + 2 * eps * _least(eps)
    near = (table - ref).abs() <= slack
    worst = torch.where(picked, wide_TE, torch.inf).amin(1, keepdim=True)
    alike = (wide_TE - worst).abs() <= 4 * eps * (1 + wide_TE.abs())
    swapped = chosen ^ picked
    sums = (table.sum(1) - ref.sum(1)).abs() <= 8 * eps * ref.sum(1).abs()
    exact = near.all(1)
    return exact, ~exact & torch.where(swapped, alike, near).all(1) & sums


def _least(eps: float) -> float:
    """The smallest normal number of the dtype with this epsilon; float16 is the one that has few."""
    return torch.finfo(torch.float16 if eps == torch.finfo(torch.float16).eps else torch.float32).tiny

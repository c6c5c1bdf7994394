"""Routing that the model holds as a table over the experts: dense weights (T, E), a mask (T, K, E), or choices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.tape import Tape
from moeopt.recognise.ids_of_masks import for_each_slot, mask_to_ids, mask_to_slots, positive_to_ids, table_to_ids
from moeopt.recognise.routing_candidates import (
    CASTS,
    asked_positive,
    axis_orders,
    constant_weight,
    constant_weights,
    possible_sources,
    rebuilt,
    table_readings,
)
from moeopt.recognise.routing_types import Extraction, Routing, RoutingForm, Steps, Table, fits_table, same_values

aten = torch.ops.aten


def by_dense(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """A (T, E) table, or (T, E, C) summed over C, that is the weights themselves; or one with further columns behind
    them, of null experts."""
    tokens, candidates = table.visits.shape
    natural = torch.tensor(table.natural)
    want = table.weights[:, natural]
    for node in sorted(possible_sources(before, floating=True), key=lambda n: -n.meta["index"]):
        shape = node.meta["shape"]
        numel = math.prod(shape)
        if numel == tokens * candidates:
            for steps, _ in table_readings(shape, tokens, candidates):
                value = Extraction(node, steps).run(tape)
                if same_values(value, want) or (asked_positive(node) and same_values(value.clamp(min=0), want)):
                    yield _dense(node, steps, table)
        elif table.alone and len(shape) > 1 and shape[-1] > candidates and numel == tokens * shape[-1]:
            steps = [*([] if len(shape) == 2 else [(aten.reshape.default, ([-1, shape[-1]],))]),
                     (aten.slice.Tensor, (-1, 0, candidates))]  # fmt: skip
            if same_values(Extraction(node, steps).run(tape), want):
                yield _dense(node, steps, table)
        elif candidates in shape and numel % (tokens * candidates) == 0 and numel and len(shape) >= 3:
            for axis in (d for d, s in enumerate(shape) if s == candidates):
                for slots in _slot_axes(len(shape), axis):
                    steps = [(aten.sum.dim_IntList, (slots,)), *_after_sum(shape, axis, slots, candidates)]
                    if same_values(Extraction(node, steps).run(tape), want):
                        yield _dense(node, steps, table)


def by_flags(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """A (T, E) table of flags that are the weights: 1 for each expert that a token has, of which there may be any
    number."""
    tokens, candidates = table.visits.shape
    want = table.weights[:, torch.tensor(table.natural)]
    if not bool(((want == 0) | (want == 1)).all()) or table.weighed:
        return
    for node in reversed(before):  # the last are those that the dispatch reads: others may be equal on this call
        if node.meta.get("dtype") != torch.bool or math.prod(node.meta["shape"]) != tokens * candidates:
            continue
        for steps, _ in table_readings(node.meta["shape"], tokens, candidates):
            if torch.equal(Extraction(node, steps).run(tape), want != 0):
                weights = Extraction(node, [*steps, (aten.to.dtype, (table.weights.dtype,))])
                yield Routing(candidates, None, weights, table.natural, RoutingForm.TABLE)


def _slot_axes(rank: int, axis: int) -> list[list[int]]:
    """The axes that capacity slots may lie on: any one that is not the expert axis, the last first."""
    return [[d] for d in reversed(range(rank)) if d != axis]


def _after_sum(shape: tuple[int, ...], axis: int, slots: list[int], candidates: int) -> Steps:
    left = [d for d in range(len(shape)) if d not in slots]
    at = left.index(axis)
    steps: Steps = []
    if at != len(left) - 1:
        steps.append((aten.movedim.int, (at, -1)))
    if len(left) != 2:
        steps.append((aten.reshape.default, ([-1, candidates],)))
    return steps


def _dense(node: fx.Node, steps: Steps, table: Table) -> Routing:
    """Every expert of a token whose weight is not zero; the others are named E, which adds nothing."""
    candidates = table.visits.shape[1]
    if asked_positive(node):
        ids = Extraction(node, [*steps, (positive_to_ids, ())])
        return Routing(candidates, ids, Extraction(node, steps), table.natural, RoutingForm.TABLE)
    full = bool(table.chosen.all())
    return Routing(
        candidates, None, Extraction(node, steps), table.natural, RoutingForm.DENSE if full else RoutingForm.TABLE
    )


def by_mask(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """One-hot choices (T, K, E) with weights (T, K); an all-zero row names the id E, which adds nothing."""
    tokens, candidates = table.visits.shape
    for node in before:
        k = _mask_slots(tape, node, tokens, candidates)
        if not k:
            continue
        shape = node.meta["shape"]
        for axis in (d for d, s in enumerate(shape) if s == candidates):
            steps: Steps = []
            if axis != len(shape) - 1:
                steps.append((aten.movedim.int, (axis, -1)))
            steps.append((aten.reshape.default, ([-1, k, candidates],)))
            onehot = Extraction(node, steps).run(tape)
            given = _is_argument(node)
            if not given and bool((onehot.sum(-1) > 1).any()):
                continue
            read = mask_to_slots if given else mask_to_ids
            form = RoutingForm.GIVEN_MASK if given else RoutingForm.ONE_HOT
            spread: Steps = [(for_each_slot, (candidates,))] if given else []
            ids_steps: Steps = [*steps, (read, ())]
            ids = read(onehot)
            named = torch.zeros(tokens, candidates + 1, dtype=torch.bool).scatter_(1, ids, True)[:, :candidates]
            if not torch.equal(named, (table.visits > 0)[:, torch.tensor(table.natural)]):
                continue
            extraction = Extraction(node, ids_steps)
            for weights in _beside_mask(before, table, k, given, spread):
                if fits_table(rebuilt(ids, weights.run(tape), table.natural, candidates), table):
                    yield Routing(ids.shape[1], extraction, weights, table.natural, form)
            constant = constant_weight(ids, table.natural, table)
            if constant is not None and not table.weighed:
                weights = constant_weights(constant, table)
                yield Routing(ids.shape[1], extraction, weights, table.natural, form.without_weights)


def _mask_slots(tape: Tape, node: fx.Node, tokens: int, candidates: int) -> int:
    """K of a tensor of zeros and ones that may be a mask (T, K, E), in any order of axes; 0 where it is none."""
    dtype, shape = node.meta.get("dtype"), node.meta.get("shape")
    if dtype is None or node.op == "get_attr" or not shape or candidates not in shape:
        return 0
    if dtype.is_floating_point and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    numel = math.prod(shape)
    if not tokens or numel % (tokens * candidates) or not numel or numel // (tokens * candidates) > candidates:
        return 0
    value = tape.value(node)
    return numel // (tokens * candidates) if bool(((value == 0) | (value == 1)).all()) else 0


def _beside_mask(before: list[fx.Node], table: Table, k: int, given: bool, spread: Steps) -> Iterator[Extraction]:
    """What may be the weights beside a mask of ``k`` slots: (T, K) tensors, or scores (T, E) where it is given."""
    tokens, candidates = table.visits.shape
    for w in sorted(possible_sources(before, floating=True), key=lambda n: -n.meta["index"]):
        orders = axis_orders(w.meta["shape"], tokens, k) if math.prod(w.meta["shape"]) == tokens * k else ()
        for order in orders:
            yield Extraction(w, [*order, *spread])
        if given and k > 1 and math.prod(w.meta["shape"]) == tokens * candidates:
            for score, _ in table_readings(w.meta["shape"], tokens, candidates):
                yield Extraction(w, [*score, (aten.repeat.default, ([1, k],))])


def _is_argument(node: fx.Node) -> bool:
    """True for an argument of the block, seen through casts and movement."""
    while (
        node.op == "call_function" and len(node.all_input_nodes) == 1 and (moves_rows(node) or op_name(node) in CASTS)
    ):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def by_choice(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None = None) -> Iterator[Routing]:
    """A (T, E) table of zeros and ones that says who is chosen, and one that holds their weights."""
    tokens, candidates = table.visits.shape
    natural = torch.tensor(table.natural)
    chosen = table.visits[:, natural]
    want = table.weights[:, natural].double()
    if bool((chosen > 1).any()):
        return
    ids: Extraction | None = None
    weights: Extraction | None = None
    for node in before:
        kind, shape = node.meta.get("dtype"), node.meta.get("shape")
        if kind is None or node.op == "get_attr" or not shape:
            continue
        if kind.is_floating_point and weights is None and math.prod(shape) == tokens:
            weights = one_for_each_token(tape, node, chosen, want)
        if math.prod(shape) != tokens * candidates:
            continue
        for steps, _ in table_readings(shape, tokens, candidates):
            value = Extraction(node, steps).run(tape)
            if value.shape != chosen.shape:
                continue
            if torch.equal(value.double(), chosen.double()):
                ids = ids or Extraction(node, [*steps, (table_to_ids, ())])
            elif kind.is_floating_point and same_values(torch.where(chosen > 0, value.double(), 0.0), want):
                weights = weights or Extraction(node, steps)
    if ids and weights:
        yield Routing(candidates, ids, weights, table.natural, RoutingForm.TABLE)


def one_for_each_token(tape: Tape, node: fx.Node, chosen: torch.Tensor, want: torch.Tensor) -> Extraction | None:
    """(T, E) weights that are one number for all experts of a token: that of ``node``, or one over it (a mean)."""
    steps: Steps = [(aten.reshape.default, ([-1, 1],)), (aten.expand.default, ([-1, chosen.shape[1]],))]
    inverse: Steps = [*steps, (aten.reciprocal.default, ())]
    for reading in (Extraction(node, steps), Extraction(node, inverse)):
        if same_values(torch.where(chosen > 0, reading.run(tape).double(), 0.0), want):
            return reading
    return None

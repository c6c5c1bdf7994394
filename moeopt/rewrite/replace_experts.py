"""Put the op where the experts' sum stood.

    rows   = reshape(x, [-1, H])
    ids    = the router's ids (T, K)          weights = the router's weights (T, K)
    sum    = experts(rows, ids, weights, bank)
    y      = reshape(sum, shape of the old sum)  (+ what it was added onto)

Numerics   ROUNDING: the sum runs in another order; each product and activation is unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from moeopt.capture.tree import tree_map
from moeopt.recognise.ids_of_masks import table_to_ids
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_by_sum import SumOfCodes, unit_rows
from moeopt.recognise.routing_types import Extraction
from moeopt.rewrite.id_range import ALL_IDS, IdRange, ids_within, weights_within
from moeopt.rewrite.kept_steps import KeptStep, KeptSteps, StepRef
from moeopt.rewrite.plan_kept_steps import VIEWS, NodeRewrite

aten = torch.ops.aten
_VIEWS = (aten.reshape.default, aten.movedim.int, aten.unsqueeze.default)


def experts_rewrite(recognition: Recognition, bank: int, within: IdRange = ALL_IDS) -> NodeRewrite:
    """The rewrite of ``recognition``, for ids ``within`` a range; ``bank`` is the number of its weights."""
    sources = [
        recognition.tokens.node,
        *recognition.tokens.beside,
        *recognition.routing.weights.nodes,
        *(recognition.routing.ids.nodes if recognition.routing.ids else []),
    ]
    needs = [n for n in (*sources, recognition.base) if n is not None]

    def apply(plan: KeptSteps, ref: Callable[[fx.Node], StepRef]) -> StepRef:
        x = ref(recognition.tokens.node)
        shape = recognition.tokens.node.meta["shape"]
        if recognition.tokens.axis != len(shape) - 1:
            x = plan.call(aten.movedim.int, x, recognition.tokens.axis, -1)
        rows = x if len(shape) == 2 else plan.call(aten.reshape.default, x, [-1, shape[recognition.tokens.axis]])
        hidden = features = shape[recognition.tokens.axis]
        if recognition.tokens.beside:
            others = [(n.meta["shape"][-1], ref(n)) for n in recognition.tokens.beside]
            parts = [plan.call(aten.reshape.default, other, [-1, width]) for width, other in others]
            rows = plan.call(aten.cat.default, [rows, *parts], 1)
            features += sum(width for width, _ in others)
        count = math.prod(shape) // max(hidden, 1)
        plan.note(rows, (count, features), recognition.tokens.node.meta.get("dtype"))
        if recognition.routing.ids is None:
            weights = _apply(plan, recognition.routing.weights, ref, None)
            ids = plan.call(table_to_ids, weights)
        else:
            ids = given = _apply(plan, recognition.routing.ids, ref, None)
            if not within.free:
                ends = (within.lowest, within.highest)
                ids = plan.call(ids_within, given, len(recognition.experts), *ends, within.wraps)
            weights = _apply(plan, recognition.routing.weights, ref, ids)
            if within.lowest is not None or within.highest is not None:
                weights = plan.call(weights_within, weights, given, within.lowest, within.highest)
        if recognition.routing.leave_out is not None:
            ids = plan.call(recognition.routing.leave_out, ids, weights, len(recognition.experts))
        y = plan.add(KeptStep("experts", bank, (rows, ids, weights), source=recognition.source))
        summed, axis = recognition.combine.node.meta["shape"], recognition.combine.axis
        plan.note(y, (count, recognition.features), recognition.combine.node.meta.get("dtype"))
        y = _restore(plan, y, summed, axis)
        return y if recognition.base is None else plan.call(aten.add.Tensor, ref(recognition.base), y)

    return NodeRewrite(recognition.combine.node, needs, recognition.interior, apply)


def _apply(plan: KeptSteps, extraction: Extraction, ref: Callable[[fx.Node], StepRef], ids: StepRef | None) -> StepRef:
    if isinstance(extraction, SumOfCodes):
        return _sum_of_codes(plan, extraction, ref)
    value = ref(extraction.source) if extraction.source is not None else ids
    assert value is not None
    if extraction.joined:
        columns = [plan.call(aten.reshape.default, ref(node), [-1, 1]) for node in extraction.nodes]
        value = plan.call(aten.cat.default, columns, 1)
    named = {"@ids": ids, "@beside": ref(extraction.nodes[-1]) if extraction.beside else None}
    shape = None if extraction.joined or extraction.source is None else extraction.source.meta.get("shape")
    for op, rest in extraction.steps:
        value = plan.call(op, value, *(named[a] if isinstance(a, str) else a for a in rest))
        shape = None if shape is None or op not in _VIEWS else tuple(op(torch.empty(shape, device="meta"), *rest).shape)
        if shape is not None and extraction.source is not None:
            plan.note(value, shape, extraction.source.meta.get("dtype"))
    return value


def _sum_of_codes(plan: KeptSteps, routing: SumOfCodes, ref: Callable[[fx.Node], StepRef]) -> StepRef:
    """(T, C) of the dispatch and the sum as the block has them, on unit vectors in place of the experts' rows."""
    made: dict[fx.Node, StepRef] = {}
    for out, rows, number in routing.codes:
        shape = out.meta["shape"]
        made[out] = plan.note(plan.call(unit_rows, ref(rows), shape[-1], number), shape, out.meta["dtype"])

    def word(node: fx.Node) -> StepRef:
        return made[node] if node in made else ref(node)

    for node in routing.sums:
        target = aten.reshape.default if node.target in VIEWS else node.target
        args, kwargs = (tree_map(fx.Node, word, tree) for tree in (node.args, dict(node.kwargs)))
        made[node] = plan.add(KeptStep("call", target, args, kwargs, node.meta.get("source", "")))
        plan.note(made[node], node.meta.get("shape"), node.meta.get("dtype"))
    assert routing.target is not None
    total = plan.call(aten.reshape.default, made[routing.target], [-1, routing.target.meta["shape"][-1]])
    return plan.call(aten.slice.Tensor, total, 1, 0, routing.experts)


def _restore(plan: KeptSteps, y: StepRef, shape: tuple[int, ...], axis: int) -> StepRef:
    """(T, H) rows back into the old sum's shape."""
    if axis >= len(shape) - 1:  # the last one, or that of a single feature without an axis of its own
        return y if len(shape) == 2 == axis + 1 else plan.call(aten.reshape.default, y, list(shape))
    moved = [s for d, s in enumerate(shape) if d != axis] + [shape[axis]]
    y = plan.call(aten.reshape.default, y, moved)
    return plan.call(aten.movedim.int, y, -1, axis)

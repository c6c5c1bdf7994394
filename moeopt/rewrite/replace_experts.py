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

from moeopt.recognise.experts import Recognition
from moeopt.recognise.routing import Recipe, table_to_ids
from moeopt.rewrite.keep import Plan, Ref, Replacement, Step

aten = torch.ops.aten


def replacement(found: Recognition, bank: int) -> Replacement:
    """The rewrite of ``found``; ``bank`` is the number of its weights in the program."""
    sources = [
        found.tokens.node,
        *found.frontier.weights.nodes,
        *(found.frontier.ids.nodes if found.frontier.ids else []),
    ]
    needs = [n for n in (*sources, found.base) if n is not None]

    def emit(plan: Plan, ref: Callable[[fx.Node], Ref]) -> Ref:
        x = ref(found.tokens.node)
        shape = found.tokens.node.meta["shape"]
        if found.tokens.axis != len(shape) - 1:
            x = plan.call(aten.movedim.int, x, found.tokens.axis, -1)
        rows = x if len(shape) == 2 else plan.call(aten.reshape.default, x, [-1, shape[found.tokens.axis]])
        hidden = shape[found.tokens.axis]
        count = math.prod(shape) // max(hidden, 1)
        plan.note(rows, (count, hidden), found.tokens.node.meta.get("dtype"))
        if found.frontier.ids is None:
            weights = _apply(plan, found.frontier.weights, ref, None)
            ids = plan.call(table_to_ids, weights)
        else:
            ids = _apply(plan, found.frontier.ids, ref, None)
            weights = _apply(plan, found.frontier.weights, ref, ids)
        y = plan._add(Step("experts", bank, (rows, ids, weights), source=found.source))
        plan.note(
            y, (count, found.combine.node.meta["shape"][found.combine.axis]), found.combine.node.meta.get("dtype")
        )
        y = _restore(plan, y, found.combine.node.meta["shape"], found.combine.axis)
        return y if found.base is None else plan.call(aten.add.Tensor, ref(found.base), y)

    return Replacement(found.combine.node, needs, found.interior, emit)


def _apply(plan: Plan, recipe: Recipe, ref: Callable[[fx.Node], Ref], ids: Ref | None) -> Ref:
    value = ref(recipe.source) if recipe.source is not None else ids
    assert value is not None
    if recipe.beside:
        columns = [plan.call(aten.reshape.default, ref(node), [-1, 1]) for node in recipe.nodes]
        value = plan.call(aten.cat.default, columns, 1)
    for op, rest in recipe.steps:
        value = plan.call(op, value, *(ids if a == "@ids" else a for a in rest))
    return value


def _restore(plan: Plan, y: Ref, shape: tuple[int, ...], axis: int) -> Ref:
    """(T, H) rows back into the old sum's shape."""
    if axis == len(shape) - 1:
        return y if len(shape) == 2 else plan.call(aten.reshape.default, y, list(shape))
    moved = [s for d, s in enumerate(shape) if d != axis] + [shape[axis]]
    y = plan.call(aten.reshape.default, y, moved)
    return plan.call(aten.movedim.int, y, -1, axis)

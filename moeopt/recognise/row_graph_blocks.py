"""Rules for products of blocks of each row's features: a block-diagonal matrix, as of Monarch and butterfly layers.

    z (M, B, K)  ->  z (B, M, K)  ->  bmm with W (B, K, N), plus b (B, 1, N)  ->  (B, M, N)  ->  (M, B, N)
    B times z (M, K)  ->  stack  ->  (B, M, K)

On the tape the rows stand behind the blocks for as long as the products take. In the graph they stay in front, and only
the product itself turns them.

Legend: M rows, B blocks of features, K and N features of one block. ``front`` dimensions stand before the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_pointwise, op_name
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter
from moeopt.value_types import PyObject

aten = torch.ops.aten
_VIEWS = ("view", "reshape", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze")
_PRODUCTS = ("bmm", "baddbmm")
_REDUCTIONS = ("sum", "mean", "amax", "amin")
_COPIES = ("clone", "detach", "alias", "contiguous", "lift_fresh_copy")


def block_rule(graph: RowGraphWriter, node: fx.Node) -> Callable[[], HeldSlots] | None:
    """What enters ``node``, a call that puts rows behind blocks of their features, or reads such; None for others."""
    held = [h for a in node.all_input_nodes if (h := graph.known.get(a)) is not None and h.lead is not None]
    name, rows = op_name(node), held[0]
    behind = any(h.front for h in held)
    if name in ("permute", "transpose", "t") and len(rows.lead or ()) == 1 and len(rows.features) > 1:
        order = _order(node, len(rows.shape))
        if behind or order[0] != 0:
            return lambda: _turn(graph, rows, order)
    if name in _PRODUCTS and not behind and rows.lead is not None and len(rows.lead) == 2 and rows.lead[0] == 1:
        return lambda: _one_block(graph, node)
    if name in ("stack", "cat") and not behind and _joins_before_rows(graph, node, held):
        return lambda: _before_rows(graph, node, held)
    return _of_blocks(graph, node, held) if behind else None


def _of_blocks(graph: RowGraphWriter, node: fx.Node, held: list[HeldSlots]) -> Callable[[], HeldSlots]:
    """What enters a call that reads rows behind blocks of their features."""
    name, rows = op_name(node), held[0]
    if name in _VIEWS:
        return lambda: _view(graph, node, rows)
    if name in _COPIES or (name == "expand" and node.meta["shape"] == node.all_input_nodes[0].meta["shape"]):
        return lambda: rows
    if name in _PRODUCTS:
        return lambda: _blocks(graph, node)
    if name in (*_REDUCTIONS, "select") and len(held) == 1 and (dims := _dims_of(node, rows)) is not None:
        return lambda: _reduced(graph, node, rows, dims)
    if is_pointwise(node) and name != "glu":
        return lambda: _pointwise(graph, node, held)
    raise graph.refused(node, "is not known to work on each row by itself where blocks of features stand before rows")


def _order(node: fx.Node, rank: int) -> list[int]:
    given, order = list[Any](node.args), list(range(rank))
    if op_name(node) == "permute":
        return [int(d) % rank for d in given[1]]
    a, b = (0, 1) if op_name(node) == "t" else (int(given[1]) % rank, int(given[2]) % rank)
    order[a], order[b] = order[b], order[a]
    return order


def _as(rows: HeldSlots, number: int, features: tuple[int, ...], front: int) -> HeldSlots:
    """A value with the rows of ``rows``, behind ``front`` dimensions of its features."""
    made = HeldSlots(number, rows.lead, (*(rows.lead or ()), *features))
    made.front = front
    return made


def _turn(graph: RowGraphWriter, rows: HeldSlots, order: list[int]) -> HeldSlots:
    at = [d + 1 if d < rows.front else d for d in range(len(order))]  # of a dimension on the tape, in the graph
    front = order.index(rows.front)
    turned = [0, *(at[d] for d in order if d != rows.front)]
    number: int = rows.number
    if turned != list(range(len(order))):
        graph.nodes.append((aten.permute.default, (rows.number, turned), {}))
        number = len(graph.slots) + len(graph.nodes)
    return _as(rows, number, tuple(rows.shape[d] for d in turned[1:]), front)


def _view(graph: RowGraphWriter, node: fx.Node, rows: HeldSlots) -> HeldSlots:
    """The dimensions before the rows, and those behind them, cut or joined among themselves."""
    shape, before = tuple(node.meta["shape"]), math.prod(rows.features[: rows.front])
    behind, (count,) = math.prod(rows.features[rows.front :]), rows.lead or (0,)
    for front, size in enumerate(shape):
        if size == count and math.prod(shape[:front]) == before and math.prod(shape[front + 1 :]) == behind:
            features = (*shape[:front], *shape[front + 1 :])
            made = graph.add(node, aten.reshape.default, rows.lead, rows.number, [-1, *features])
            return _as(rows, made.number, features, front)
    raise graph.refused(node, "joins features of different rows")


def _joins_before_rows(graph: RowGraphWriter, node: fx.Node, held: list[HeldSlots]) -> bool:
    """Whether rows (M, ...), or (1, M, ...), become parts of one row each, in a dimension before the rows."""
    lead, parts = held[0].lead or (), [graph.known[a] for a in node.args[0]]  # type: ignore[union-attr,index]
    alike = all(p.lead == lead and p.shape == held[0].shape for p in parts)
    first = tuple(node.args[1:]) in ((), (0,))
    return alike and first and (len(lead) == 1 if op_name(node) == "stack" else len(lead) == 2 and lead[0] == 1)


def _before_rows(graph: RowGraphWriter, node: fx.Node, held: list[HeldSlots]) -> HeldSlots:
    parts = [graph.known[a].number for a in node.args[0]]  # type: ignore[union-attr,index]
    made = graph.add(node, aten.stack.default, None, parts, 1)
    joined = HeldSlots(made.number, held[0].lead[-1:], (held[0].lead[-1], len(parts), *held[0].features))  # type: ignore[index]
    joined.front = 1
    return joined


def _dims_of(node: fx.Node, rows: HeldSlots) -> list[int] | None:
    """The dimensions that a call takes away, none of which is the rows'; None where that one is among them."""
    given: PyObject = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [
        int(d) % len(rows.shape) for d in (given if isinstance(given, (list, tuple)) else [given] * (given is not None))
    ]
    return dims if dims and rows.front not in dims else None


def _reduced(graph: RowGraphWriter, node: fx.Node, rows: HeldSlots, dims: list[int]) -> HeldSlots:
    """A sum over dimensions before the rows, or behind them; or a part of one of these."""
    at = [d + 1 if d < rows.front else d for d in dims]
    if op_name(node) == "select":
        keep = False
        made = graph.add(node, node.target, None, rows.number, at[0], node.args[2])
    else:
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        typed = {k: v for k, v in graph.kwargs(node).items() if k == "dtype"}
        made = graph.add(node, node.target, None, rows.number, at, keep, **typed)
    front = rows.front if keep else rows.front - sum(d < rows.front for d in dims)
    shape = tuple(node.meta["shape"])
    return _as(rows, made.number, (*shape[:front], *shape[front + 1 :]), front)


def _blocks(graph: RowGraphWriter, node: fx.Node) -> HeldSlots:
    *bias, left, right = (graph.known[a] for a in _operands(node))
    if left.lead is None or right.lead is not None or left.front != 1 or len(left.features) != 2:
        raise graph.refused(node, "multiplies rows with one another, or from the right")
    blocks, _, out = right.shape
    first = graph.add(node, aten.permute.default, None, left.number, [1, 0, 2])
    more = [_bias_of_blocks(graph, node, b, (blocks, out)).number for b in bias]
    product = graph.add(node, node.target, None, *more, first.number, right.number, **graph.kwargs(node))
    made = graph.add(node, aten.permute.default, None, product.number, [1, 0, 2])
    return _as(left, made.number, (blocks, out), 1)


def _operands(product: fx.Node) -> list[fx.Node]:
    """The left and the right one of a product, after what is added to it."""
    return [a for a in product.args if isinstance(a, fx.Node)]


def _bias_of_blocks(graph: RowGraphWriter, node: fx.Node, bias: HeldSlots, size: tuple[int, int]) -> HeldSlots:
    """What is added to a product of B blocks by N: rows that lie as its result, or a weight that is the same for all
    rows."""
    if bias.lead is None and (len(bias.shape) < 2 or bias.shape[-2] == 1):
        return bias
    if bias.lead is None:
        raise graph.refused(node, "gives rows different weights by their place")
    if bias.front != 1 or bias.features != size:
        raise graph.refused(node, "meets rows that lie differently")
    return graph.add(node, aten.permute.default, None, bias.number, [1, 0, 2])


def _one_block(graph: RowGraphWriter, node: fx.Node) -> HeldSlots:
    """One matrix for all features, written as a product of one block (an einsum over several dimensions)."""
    *bias, left, right = (graph.known[a] for a in _operands(node))
    if left.lead is None or right.lead is not None or len(left.features) != 1 or len(right.shape) != 3:
        raise graph.refused(node, "multiplies rows with one another, or from the right")
    if any(b.lead is not None or math.prod(b.shape) != b.shape[-1] for b in bias):
        raise graph.refused(node, "meets rows that lie differently")
    matrix = graph.add(node, aten.reshape.default, None, right.number, list(right.shape[1:]))
    more = [graph.add(node, aten.reshape.default, None, b.number, [b.shape[-1]]).number for b in bias]
    op = aten.addmm.default if bias else aten.mm.default
    return graph.add(node, op, left.lead, *more, left.number, matrix.number, **graph.kwargs(node))


def _pointwise(graph: RowGraphWriter, node: fx.Node, held: list[HeldSlots]) -> HeldSlots:
    """Rows that lie alike, and weights that are the same for all rows: the rows' dimension is taken out of these."""
    rows, shape = held[0], tuple(node.meta["shape"])
    turned = (*shape[: rows.front], *shape[rows.front + 1 :])
    if len({(h.front, h.shape) for h in held}) > 1 or turned != rows.features:
        raise graph.refused(node, "meets rows that lie differently")

    def word(a: PyObject) -> PyObject:
        one = graph.known[a] if isinstance(a, fx.Node) else None
        if one is None or one.lead is not None or math.prod(one.shape) == 1:
            return graph.words(a)
        broadcast = (1,) * (len(shape) - len(one.shape)) + one.shape
        if broadcast[rows.front] != 1:
            raise graph.refused(node, "gives rows different weights by their place")
        sizes = [*broadcast[: rows.front], *broadcast[rows.front + 1 :]]
        return graph.add(node, aten.reshape.default, None, one.number, sizes).number

    args = [word(a) for a in node.args]
    made = graph.add(node, node.target, None, *args, **graph.kwargs(node))
    return _as(rows, made.number, rows.features, rows.front)

"""Rules for rows whose features are not the last dimension of the tape's tensors: channels first, as of convolutions.

    (N, C, H, W) or (N, C, L)      each place of an image is a row of C features; a 1x1 convolution is a product

In the graph all rows stand in one leading dimension and features last, so that what turns them on the tape is no call
of the graph. A batch norm with running statistics scales and shifts each channel.

Legend: N images, C channels, K channels of a product's result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, is_pointwise, op_name
from moeopt.ir.row_function import GETITEM, Value
from moeopt.recognise.row_graph_writer import HeldSlots, RowGraphWriter
from moeopt.value_types import PyObject

aten = torch.ops.aten
LAST = -1
_BATCH_NORMS = ("_native_batch_norm_legit_no_training", "native_batch_norm", "_batch_norm_no_update")
_COPIES = ("clone", "detach", "alias", "contiguous", "lift_fresh_copy")


def rows_last(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """``shape`` with the dimension ``axis`` last."""
    axis %= len(shape)
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def channel_rule(graph: RowGraphWriter, node: fx.Node) -> Callable[[], HeldSlots] | None:
    """What enters ``node``, a call that turns rows or that reads turned ones; None for any other."""
    held = [h for a in node.all_input_nodes if (h := graph.known.get(a)) is not None and h.lead is not None]
    name = op_name(node)
    if name in ("transpose", "permute") and len(held[0].features) == 1 and (axis := _turned(node, held[0])) is not None:
        return lambda: _as(held[0], held[0].number, held[0].features, axis)
    if all(h.axis == LAST for h in held):
        return None
    if is_matmul(node) and name != "convolution":
        raise graph.refused(node, "multiplies rows with one another, or from the right")
    if name == "convolution":
        return lambda: _convolution(graph, node)
    if name in _BATCH_NORMS:
        return lambda: _batch_norm(graph, node, held[0])
    if name == "getitem":
        return lambda: _result(graph, node, held[0])
    if name in _COPIES:
        return lambda: held[0]
    if name == "_to_copy":
        return lambda: _like(graph, node, held[0], node.target, held[0].number, dtype=node.meta["dtype"])
    if is_pointwise(node) and name != "glu":
        return lambda: _pointwise(graph, node, held)
    raise graph.refused(node, "is not known to work on each row by itself where channels are not the last dimension")


def _turned(node: fx.Node, held: HeldSlots) -> int | None:
    """Where the features stand after ``node``, if it leaves the rows in their order."""
    rank, given = len(held.shape), list[Any](node.args)
    order = list(range(rank))
    if op_name(node) == "permute":
        order = [int(d) % rank for d in given[1]]
    else:
        a, b = int(given[1]) % rank, int(given[2]) % rank
        order[a], order[b] = order[b], order[a]
    features = held.axis % rank
    if [d for d in order if d != features] != [d for d in range(rank) if d != features]:
        return None
    axis = order.index(features)
    return LAST if axis == rank - 1 else axis


def _as(held: HeldSlots, number: int, features: tuple[int, ...], axis: int) -> HeldSlots:
    """A value with the rows of ``held``."""
    return HeldSlots(number, held.lead, (*(held.lead or ()), *features), axis=axis)


def _like(
    graph: RowGraphWriter, node: fx.Node, held: HeldSlots, op: PyObject, *args: PyObject, **kwargs: PyObject
) -> HeldSlots:
    made = graph.add(node, op, held.lead, *args, **kwargs)
    return _as(held, made.number, held.features, held.axis)


def _convolution(graph: RowGraphWriter, node: fx.Node) -> HeldSlots:
    _, _, bias, stride, padding, _, transposed, _, groups = list[Any](node.args[:9])
    rows, weight = graph.known[node.args[0]], graph.known[node.args[1]]  # type: ignore[index]
    if rows.lead is None or rows.axis != 1 or weight.lead is not None:
        raise graph.refused(node, "has kernels that are computed from rows, or reads channels in another place")
    wide = any(size != 1 for size in weight.shape[2:]) or any(s != 1 for s in stride) or any(padding)
    if wide or transposed or groups != 1:
        raise graph.refused(
            node, "is wider than 1x1, steps, pads or has groups; the op multiplies each token's row by a matrix"
        )
    k, c = weight.shape[:2]
    matrix = graph.add(node, aten.reshape.default, None, weight.number, [k, c])
    more = () if bias is None else (graph.known[bias].number,)
    made = graph.add(node, aten.linear.default, rows.lead, rows.number, matrix.number, *more)
    return _as(rows, made.number, (k,), rows.axis)


def _batch_norm(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    training = op_name(node) == "native_batch_norm" and bool(node.args[5])
    if training or held.axis != 1:
        raise graph.refused(node, "takes statistics of the batch, so a row's result depends on other rows")
    made = _like(graph, node, held, node.target, *graph.words(node.args), **graph.kwargs(node))
    made.items = [made]
    return made


def _result(graph: RowGraphWriter, node: fx.Node, held: HeldSlots) -> HeldSlots:
    if node.args[1] != 0 or held.items is None:
        raise graph.refused(node, "reads a statistic of a norm")
    return _like(graph, node, held, GETITEM, held.number, 0)


def _pointwise(graph: RowGraphWriter, node: fx.Node, held: list[HeldSlots]) -> HeldSlots:
    """Rows that lie alike, with one number for each channel, one for all, or other such rows."""
    if len({(h.lead, h.axis) for h in held}) > 1 or any(len(h.features) != 1 for h in held):
        raise graph.refused(node, "meets rows that lie differently")
    rows, shape = held[0], tuple(node.meta["shape"])
    moved = rows_last(shape, rows.axis)
    if moved[:-1] != rows.lead:
        raise graph.refused(node, "meets rows that lie differently")

    def word(a: PyObject) -> PyObject:
        if not isinstance(a, fx.Node):
            return a
        one = graph.known[a]
        if one.lead is not None or not one.shape:
            return one.number
        broadcast = (1,) * (len(shape) - len(one.shape)) + one.shape
        *places, channels = rows_last(broadcast, rows.axis)
        if any(size != 1 for size in places):
            raise graph.refused(node, "gives rows different weights by their place")
        graph.nodes.append((aten.reshape.default, (one.number, [channels]), {}))
        return Value(len(graph.slots) + len(graph.nodes))

    args = [word(a) for a in node.args]
    made = graph.add(node, node.target, rows.lead, *args, **graph.kwargs(node))
    return _as(rows, made.number, moved[-1:], rows.axis)

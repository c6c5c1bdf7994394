"""The cross entropy of shares of classes, or with smoothed labels, for which torch's exporter has no form.

    shares p       -sum_c  w_c  p_c  l_c                                  l: the log_softmax of C scores a row
    smoothing s    (1 - s) loss  -  s  mean_c  w_c  l_c                   of ids: without the rows that are ignored

A mean is over the rows; of ids over their weights, where they are not ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moeopt.lower.onnx.graph_calls import call
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
_NAMES = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
_DEFAULTS = {"weight": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
_NONE, _MEAN = 0, 1


def write_cross_entropy(graph: fx.Graph, node: PyObject) -> None:
    """Write ``node``, a cross_entropy_loss, as sums; with ids of classes and without smoothing it is left."""
    given: dict[str, Any] = _DEFAULTS | dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    x, target, weight, smoothing = (given[name] for name in ("input", "target", "weight", "label_smoothing"))
    shares = target.meta["val"].is_floating_point()
    if not shares and not smoothing:
        return
    dim = 1 if x.meta["val"].dim() > 1 else 0
    with graph.inserting_before(node):
        logs = call(graph, aten.log_softmax.int, x, dim)
        if shares:
            rows = _rows(graph, call(graph, aten.mul.Tensor, logs, target), dim, weight)
            made = _reduced(graph, rows, given["reduction"])
        else:
            made = call(
                graph, aten.nll_loss_nd.default, logs, target, weight, given["reduction"], given["ignore_index"]
            )
        if smoothing:
            rows = _rows(graph, logs, dim, weight, aten.mean.dim)  # the number of classes may be known at a call only
            even = _reduced(graph, rows, given["reduction"]) if shares else _of_ids(graph, rows, given)
            even = call(graph, aten.mul.Tensor, even, smoothing)
            made = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, made, 1 - smoothing), even)
    made.meta |= {"val": node.meta["val"], "stack_trace": node.meta.get("stack_trace", "")}
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    made.name = node.name  # the program's signature knows its results by name


def _rows(
    graph: fx.Graph, parts: fx.Node, dim: int, weight: fx.Node | None, over: FxTarget = aten.sum.dim_IntList
) -> PyObject:
    """Minus the sum of each row, or its mean, with the classes' weights."""
    if weight is not None:
        beside = [1] * dim + [-1] + [1] * (parts.meta["val"].dim() - dim - 1)
        parts = call(graph, aten.mul.Tensor, parts, call(graph, aten.reshape.default, weight, beside))
    return call(graph, aten.neg.default, call(graph, over, parts, [dim]))


def _reduced(graph: fx.Graph, rows: fx.Node, reduction: int) -> PyObject:
    if reduction == _NONE:
        return rows
    return call(graph, aten.mean.default if reduction == _MEAN else aten.sum.default, rows)


def _of_ids(graph: fx.Graph, rows: fx.Node, given: dict[str, Any]) -> PyObject:
    """The reduced sum of ``rows`` that are not ignored."""
    ids, weight, reduction = given["target"], given["weight"], given["reduction"]
    ignored = call(graph, aten.eq.Scalar, ids, given["ignore_index"])
    rows = call(graph, aten.masked_fill.Scalar, rows, ignored, 0.0)
    if reduction == _NONE:
        return rows
    total = call(graph, aten.sum.default, rows)
    if reduction != _MEAN:
        return total
    many = call(graph, aten.logical_not.default, ignored)
    if weight is not None:
        kept = call(graph, aten.reshape.default, call(graph, aten.masked_fill.Scalar, ids, ignored, 0), [-1])
        own = call(graph, aten.index_select.default, weight, 0, kept)
        many = call(graph, aten.mul.Tensor, own, call(graph, aten.reshape.default, many, [-1]))
    return call(graph, aten.div.Tensor, total, call(graph, aten.sum.default, many))

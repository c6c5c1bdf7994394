"""Adaptive pools of a free size, in a traced graph, as means or maxima of slices.

Place n of O reads ``x[n S // O : ceil((n + 1) S / O)]`` of S places. torch works the windows out when a program is
decomposed, for the sizes of the call that was traced: an engine would hold these windows for all others.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moeopt.errors import NotSaveableError
from moeopt.lower.onnx.graph_calls import call
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
_MEANS: dict[FxTarget, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
}
_MAXIMA: dict[FxTarget, int] = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
ADAPTIVE_POOLS = _MEANS | _MAXIMA
"""How many of the last dimensions each pools."""


def write_adaptive_pool(graph: fx.Graph, node: PyObject) -> None:
    """``node``, a call of one of :data:`ADAPTIVE_POOLS`, in place; as it is where its sizes are known.

    Raises:
        NotSaveableError: the places of its maxima are read.
    """
    x, wanted = node.args[:2]
    shape, many = x.meta["val"].shape, ADAPTIVE_POOLS[node.target]
    dims = range(len(shape) - many, len(shape))
    largest = node.target in _MAXIMA
    if not node.users or not any(isinstance(shape[d], torch.SymInt) for d in dims):
        return
    if largest and any(user.args[1] == 1 and user.users for user in node.users):
        raise NotSaveableError(
            f"{node.target} of a free size with the places of its maxima has no ONNX form; use backend='torch', or fix "
            "that size"
        )
    results = [user for user in node.users if user.args[1] == 0] if largest else [node]
    value = x
    with graph.inserting_before(node):
        for d, parts in zip(dims, wanted, strict=True):
            value = _pooled(graph, value, d, parts, aten.amax.default if largest else aten.mean.dim)
    value.meta["stack_trace"] = node.meta.get("stack_trace", "")
    for result in results:
        result.replace_all_uses_with(value)
        name = result.name
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    value.name = name  # the program's signature knows its results by name


def _pooled(graph: fx.Graph, x: PyObject, dim: int, parts: int, reduce: FxTarget) -> PyObject:
    """``x`` with ``parts`` places of ``dim``."""
    size = x.meta["val"].shape[dim]
    size = call(graph, aten.sym_size.int, x, dim) if isinstance(size, torch.SymInt) else size
    found = []
    for n in range(parts):
        first = call(graph, operator.floordiv, call(graph, operator.mul, size, n), parts)
        end = call(graph, operator.add, call(graph, operator.mul, size, n + 1), parts - 1)
        part = call(graph, aten.slice.Tensor, x, dim, first, call(graph, operator.floordiv, end, parts))
        found.append(call(graph, reduce, part, [dim], True))
    joined = graph.call_function(aten.cat.default, (found, dim))
    joined.meta["val"] = aten.cat.default([part.meta["val"] for part in found], dim)
    return joined

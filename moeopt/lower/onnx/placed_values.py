"""Calls that write values at places, in a traced graph, by calls that ONNX has a form for.

scatter(reduce="add", "multiply")   scatter_reduce with "sum", "prod"
index_reduce                        scatter_reduce at the index of each value
put                                 index_put into the flat tensor
bincount of weights                 scatter_add of these; as many places as the call asks for at least
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moeopt.lower.onnx.graph_calls import call
from moeopt.value_types import PyObject

aten = torch.ops.aten
_REDUCE = {"add": "sum", "multiply": "prod"}


def write_at_places(graph: fx.Graph) -> None:
    """Change ``graph`` in place; what the graph computes stays, and so do the checks of indices behind this."""
    for node in list(graph.nodes):
        form = _FORMS.get(node.target)
        if form is None:
            continue
        with graph.inserting_before(node):
            found = form(graph, node)
        if found is None:
            continue
        found.meta |= {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.replace_all_uses_with(found)
        name = node.name
        graph.erase_node(node)
        found.name = name  # the program's signature knows its results by name


def _scattered(graph: fx.Graph, node: PyObject) -> PyObject:
    self, dim, index, source = node.args[:4]
    if not isinstance(source, fx.Node):
        source = call(graph, aten.full_like.default, index, source, dtype=self.meta["val"].dtype)
    return call(graph, aten.scatter_reduce.two, self, dim, index, source, _REDUCE[node.kwargs["reduce"]])


def _index_reduced(graph: fx.Graph, node: PyObject) -> PyObject:
    self, dim, index, source, reduce = node.args[:5]
    shape = source.meta["val"].shape
    if not shape:
        return None
    axis = dim % len(shape)
    flat = call(graph, aten.reshape.default, index, [-1 if d == axis else 1 for d in range(len(shape))])
    at = call(graph, aten.expand.default, flat, _sizes(graph, source))
    return call(graph, aten.scatter_reduce.two, self, axis, at, source, reduce, **node.kwargs)


def _put(graph: fx.Graph, node: PyObject) -> PyObject:
    self, index, source, *accumulate = node.args
    flat, at, values = (call(graph, aten.reshape.default, x, [-1]) for x in (self, index, source))
    written = call(graph, aten.index_put.default, flat, [at], values, *accumulate, **node.kwargs)
    return call(graph, aten.reshape.default, written, _sizes(graph, self))


def _weighed_counts(graph: fx.Graph, node: PyObject) -> PyObject:
    """None for counts without weights, and for as many places as data decide."""
    ids, weights, least = (*node.args, None, 0)[:3]
    weights, least = node.kwargs.get("weights", weights), node.kwargs.get("minlength", least)
    if weights is None or not least:
        return None
    dtype = torch.float32 if weights.meta["val"].dtype == torch.float32 else torch.float64
    places = call(graph, aten.new_zeros.default, weights, [least], dtype=dtype)
    at, added = call(graph, aten.to.dtype, ids, torch.int64), call(graph, aten.to.dtype, weights, dtype)
    return call(graph, aten.scatter_add.default, places, 0, at, added)


def _sizes(graph: fx.Graph, x: fx.Node) -> list[PyObject]:
    sizes = x.meta["val"].shape
    return [n if isinstance(n, int) else call(graph, aten.sym_size.int, x, d) for d, n in enumerate(sizes)]


_FORMS: dict[PyObject, Callable[[fx.Graph, PyObject], PyObject]] = {
    aten.scatter.reduce: _scattered,
    aten.scatter.value_reduce: _scattered,
    aten.index_reduce.default: _index_reduced,
    aten.put.default: _put,
    aten.bincount.default: _weighed_counts,
}

"""Ops that a runtime gets wrong on no rows, where data decide how many rows there are: an expert that nobody chose.

    gru, lstm, rnn     with a row of zeros more, which is cut off again: ONNX Runtime ends the process on an empty batch
    group_norm, im2col the same: a Reshape with a size that follows from the others fails on nothing
    instance_norm      with a place of zeros where there is none: ONNX Runtime ends the process; of no rows with a
                       weight PyTorch raises, so an index of the weight is out of range
    cross_entropy      of classes, in its two steps: ONNX Runtime's one reshapes as group_norm does
    var                the sum of the squares over no less than nothing; means: :mod:`~.means_of_nothing`

An engine refuses inputs without rows, so sizes of inputs are as they are; not so the rows of a function that every
expert has for itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection
from typing import TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from moeopt.lower.onnx.graph_calls import call
from moeopt.value_types import PyObject

Symbols: TypeAlias = Callable[[PyObject], Collection[PyObject]]

aten = torch.ops.aten
_RECURRENT = (aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_BY_ROWS = (aten.group_norm.default, aten.im2col.default)
_SPREADS = {
    aten.var.default: ("unbiased",),
    aten.var.dim: ("dim", "unbiased", "keepdim"),
    aten.var.correction: ("dim",),
    aten.var_mean.default: ("unbiased",),
    aten.var_mean.dim: ("dim", "unbiased", "keepdim"),
    aten.var_mean.correction: ("dim",),
}
"""Variances, and their arguments by place after the tensor."""


def around_no_rows(graph: fx.Graph, may_be_none: Symbols = free_unbacked_symbols) -> None:
    """Change ``graph`` in place; what the graph computes of some rows stays.

    ``may_be_none`` gives the symbols of a size, none where the size is not 0.
    """
    for node in list(graph.nodes):
        if node.target in _RECURRENT:
            _with_a_row_more(graph, node, may_be_none)
        elif node.target in _BY_ROWS:
            _with_a_first_row_more(graph, node, may_be_none)
        elif node.target is aten.native_group_norm.default and _chosen(node.all_input_nodes[0], [0], may_be_none):
            if (normed := _as_group_norm(graph, node)) is not None:
                _with_a_first_row_more(graph, normed, may_be_none)
            else:
                _with_statistics_of_a_row_more(graph, node)
        elif node.target is aten.instance_norm.default:
            _refuse_no_rows(graph, node, may_be_none)
            _with_places(graph, node)
        elif node.target is aten.cross_entropy_loss.default:
            _as_likelihood(graph, node, may_be_none)
        elif node.target in _SPREADS:
            _spread(graph, node, may_be_none)


def _with_a_row_more(graph: fx.Graph, node: PyObject, may_be_none: Symbols) -> None:
    x, states, *rest = node.args
    rows = 0 if rest[-1] else 1
    if not _chosen(x, [rows], may_be_none):
        return
    several = isinstance(states, (list, tuple))
    with graph.inserting_before(node):
        size = call(graph, aten.sym_size.int, x, rows)
        wide = [_row_more(graph, state, 1) for state in (states if several else [states])]
        wider = _row_more(graph, x, rows)
        made = graph.call_function(node.target, (wider, wide if several else wide[0], *rest))
    made.meta |= {"val": node.meta["val"], "stack_trace": node.meta.get("stack_trace", "")}
    for part in list(node.users):
        dim = 1 if part.args[1] else rows
        value = part.meta["val"]
        with graph.inserting_before(part):
            whole = graph.call_function(operator.getitem, (made, part.args[1]))
            whole.meta["val"] = _longer(value, dim)
            kept = graph.call_function(aten.slice.Tensor, (whole, dim, 0, size))
        _replace(graph, part, kept)
    graph.erase_node(node)


def _with_a_first_row_more(graph: fx.Graph, node: PyObject, may_be_none: Symbols) -> None:
    x, *rest = node.args
    if not _chosen(x, [0], may_be_none):
        return
    with graph.inserting_before(node):
        size = call(graph, aten.sym_size.int, x, 0)
        made = graph.call_function(node.target, (_row_more(graph, x, 0), *rest), node.kwargs)
        made.meta |= node.meta | {"val": _longer(node.meta["val"], 0)}
        kept = graph.call_function(aten.slice.Tensor, (made, 0, 0, size))
    _replace(graph, node, kept)


def _with_places(graph: fx.Graph, node: PyObject) -> None:
    """A place more only where there is none: of some places, one more would change the mean."""
    wide, *rest = node.args
    value = wide.meta["val"]
    dims = [d for d in range(2, value.dim()) if not statically_known_true(value.shape[d] >= 1)]
    if not dims:
        return
    with graph.inserting_before(node):
        sizes = {d: call(graph, aten.sym_size.int, wide, d) for d in dims}
        for d, size in sizes.items():
            more = call(graph, torch.sym_max, call(graph, operator.sub, 1, size), 0)
            wide = graph.call_function(aten.constant_pad_nd.default, (wide, [0, 0] * (value.dim() - 1 - d) + [0, more]))
            value = wide.meta["val"] = _longer(value, d, more.meta["val"])
        kept = graph.call_function(node.target, (wide, *rest), node.kwargs)
        for d, size in sizes.items():
            kept.meta["val"] = value
            kept = graph.call_function(aten.slice.Tensor, (kept, d, 0, size))
            value = value.new_empty([*value.shape[:d], size.meta["val"], *value.shape[d + 1 :]])
    _replace(graph, node, kept)


def _refuse_no_rows(graph: fx.Graph, node: PyObject, may_be_none: Symbols) -> None:
    x, weight = node.args[:2]
    if weight is None or not _chosen(x, [0], may_be_none):
        return
    with graph.inserting_before(node):
        many = call(
            graph, aten.sum.default, call(graph, aten.new_ones.default, x, [call(graph, aten.sym_size.int, x, 0)])
        )
        at = call(graph, aten.mul.Tensor, call(graph, aten.lt.Scalar, many, 1), 2)
        at = call(graph, aten.reshape.default, at, [1])
        twice = call(graph, aten.stack.default, [weight, weight])  # of one it would be a check of expert ids
        node.update_arg(1, call(graph, aten.select.int, call(graph, aten.index_select.default, twice, 0, at), 0, 0))


def _as_group_norm(graph: fx.Graph, node: PyObject) -> fx.Node | None:
    """The same without the statistics; None where they are read."""
    if any(part.args[1] for part in node.users if part.users):
        return None
    x, weight, bias, _, _, _, groups, eps = node.args
    with graph.inserting_before(node):
        normed = graph.call_function(aten.group_norm.default, (x, groups, weight, bias, eps))
    for part in list(node.users):
        if part.users:
            _replace(graph, part, normed)
        else:
            graph.erase_node(part)
    graph.erase_node(node)
    return normed


def _with_statistics_of_a_row_more(graph: fx.Graph, node: PyObject) -> None:
    x, weight, bias, _, *rest = node.args
    with graph.inserting_before(node):
        size = call(graph, aten.sym_size.int, x, 0)
        more = call(graph, operator.add, size, 1)
        made = graph.call_function(node.target, (_row_more(graph, x, 0), weight, bias, more, *rest), node.kwargs)
        made.meta |= node.meta | {"val": tuple(_longer(value, 0) for value in node.meta["val"])}
    for part in list(node.users):
        with graph.inserting_before(part):
            longer = graph.call_function(operator.getitem, (made, part.args[1]))
            longer.meta |= part.meta | {"val": made.meta["val"][part.args[1]]}
            kept = graph.call_function(aten.slice.Tensor, (longer, 0, 0, size))
        _replace(graph, part, kept)
    graph.erase_node(node)


def _as_likelihood(graph: fx.Graph, node: PyObject, may_be_none: Symbols) -> None:
    x, target, *rest = node.args
    smoothing = rest[3] if len(rest) > 3 else node.kwargs.get("label_smoothing")
    value = x.meta["val"]
    shares = target.meta["val"].is_floating_point()
    if smoothing or shares or not _chosen(x, list(range(value.dim())), may_be_none):
        return
    given = {k: v for k, v in node.kwargs.items() if k != "label_smoothing"}
    with graph.inserting_before(node):
        logs = call(graph, aten.log_softmax.int, x, 1 if value.dim() > 1 else 0)
        loss = graph.call_function(aten.nll_loss_nd.default, (logs, target, *rest[:3]), given)
    _replace(graph, node, loss)


def _row_more(graph: fx.Graph, x: fx.Node, dim: int) -> PyObject:
    """``x`` with zeros at the end of a dimension."""
    value = x.meta["val"]
    more = graph.call_function(aten.constant_pad_nd.default, (x, [0, 0] * (value.dim() - 1 - dim) + [0, 1], 0.0))
    more.meta["val"] = _longer(value, dim)
    return more


def _longer(value: torch.Tensor, dim: int, more: int | torch.SymInt = 1) -> torch.Tensor:
    return value.new_empty([size + more if d == dim else size for d, size in enumerate(value.shape)])


def _spread(graph: fx.Graph, node: PyObject, may_be_none: Symbols) -> None:
    """The variance as sums: of no rows, or of no more than the correction, it is a NaN."""
    x, *places = node.args
    given = dict(zip(_SPREADS[node.target], places, strict=False)) | node.kwargs
    dims = _dims(x.meta["val"], given.get("dim"))
    if not _chosen(x, dims, may_be_none):
        return
    both, keep = node.target.overloadpacket is aten.var_mean, given.get("keepdim", False)
    correction = given.get("correction", int(given.get("unbiased", True)))
    with graph.inserting_before(node):
        count = _count(graph, x, dims)
        mean = call(graph, aten.div.Tensor, call(graph, aten.sum.dim_IntList, x, dims, True), count)
        squares = call(graph, aten.square.default, call(graph, aten.sub.Tensor, x, mean))
        total = call(graph, aten.sum.dim_IntList, squares, dims, keep)
        less = call(graph, torch.sym_max, call(graph, operator.sub, count, 1 if correction is None else correction), 0)
        spread = call(graph, aten.div.Tensor, total, less)
        if both and not keep:
            mean = call(graph, aten.squeeze.dims, mean, dims)
    if not both:
        _replace(graph, node, spread)
        return
    for part in list(node.users):
        _replace(graph, part, mean if part.args[1] else spread)
    graph.erase_node(node)


def _dims(value: torch.Tensor, given: PyObject) -> list[int]:
    return [d % value.dim() for d in given or range(value.dim())]


def _chosen(x: fx.Node, dims: list[int], may_be_none: Symbols) -> bool:
    """Whether ``x`` may have no places along ``dims``."""
    return any(may_be_none(x.meta["val"].shape[d]) for d in dims)


def _count(graph: fx.Graph, x: fx.Node, dims: list[int]) -> PyObject:
    sizes = [call(graph, aten.sym_size.int, x, d) for d in dims]
    return functools.reduce(functools.partial(call, graph, operator.mul), sizes)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = old.meta["val"]
    new.meta["stack_trace"] = old.meta.get("stack_trace", "")
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    new.name = old.name  # the program's signature knows its results by name

"""Indices below zero are an error in PyTorch's ``embedding``, ``gather``, ``index_select`` and scatters, and count from
the end in ONNX: a padding id of -1 would get the last row of the table without a word.

    Gather(table, ids)   ->   Gather(table, Where(ids < 0, 2^31 - 1, ids))      which the runtime refuses
    bincount(ids)        ->   bincount(ids + Gather([0, 0], 2 any(ids < 0)))         the same, where ids make the size
    one_hot(ids, n)      ->   the same with any(ids < 0 or ids >= n)            ONNX gives such an id a row of zeros;
                                                                                but of the places of n columns at most
    nll_loss(x, ids)     ->   the same with any(ids < 0 and ids != ignore_index)

Left as they are: indices that a sort, a top-k or the like gave, through whatever moves or selects them.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moeopt.capture.op_kinds import is_factory, moves_rows, op_name
from moeopt.lower.onnx.graph_calls import call
from moeopt.value_types import PyObject

aten = torch.ops.aten
_INDEX = {
    aten.embedding.default: 1,
    aten.gather.default: 2,
    aten.index_select.default: 2,
    aten.scatter.src: 2,
    aten.scatter.value: 2,
    aten.scatter_add.default: 2,
    aten.scatter_reduce.two: 2,
    aten.index_add.default: 2,
    aten.index_copy.default: 2,
}
"""By the op the place of its indices."""
_COUNTED = {
    aten.bincount.default: 0,
    aten.one_hot.default: 0,
    aten.repeat_interleave.Tensor: 0,
    aten.repeat_interleave.self_Tensor: 1,
    aten.embedding_bag.padding_idx: 1,
    aten.nll_loss_nd.default: 1,
    aten.cross_entropy_loss.default: 1,
}
"""By the op that makes places for its indices, or takes more of them than places, the place of the indices."""
_IGNORE = 4
"""The place of the number that a loss ignores."""
_NOT_NEGATIVE = ("argsort", "argmax", "argmin", "nonzero", "nonzero_numpy", "bincount", "one_hot", "multinomial", "abs")
_VALUES_AND_PLACES = ("topk", "sort", "max", "min", "kthvalue")
_KEEP = (
    "to", "_to_copy", "floor_divide", "div", "remainder", "cumsum", "sum", "add", "mul", "where", "clamp_min", "max",
    "min",
)  # fmt: skip
"""Give no number below zero where their operands, tensors and numbers, have none."""
_OF_SEVERAL = (
    "cat", "stack", "index_put", "scatter", "slice_scatter", "select_scatter", "as_strided_scatter", "masked_scatter",
    "index_copy", "copy",
)  # fmt: skip
_FILLED_WITH = {aten.constant_pad_nd.default: 2, aten.scatter.value: 3}
"""By the op the place of the number that fills."""
_BEYOND = (1 << 31) - 1


def refuse_negative_indices(graph: fx.Graph) -> None:
    """Give indices that may be below zero a value that no runtime takes there."""
    known: dict[fx.Node, bool] = {}
    checked: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in _COUNTED:
            _check_counted(graph, node, known)
        at = _INDEX.get(node.target)
        index = node.args[at] if at is not None and len(node.args) > at else None
        if not isinstance(index, fx.Node) or _not_negative(index, known):
            continue
        if index not in checked:
            checked[index] = _checked(graph, index)
        node.update_arg(at, checked[index])
    graph.lint()


def _check_counted(graph: fx.Graph, node: PyObject, known: dict[fx.Node, bool]) -> None:
    at = _COUNTED[node.target]
    ids = node.args[at]
    if ids.meta["val"].is_floating_point():
        return
    many = node.args[1] if node.target is aten.one_hot.default and len(node.args) > 1 else -1
    below, above = not _not_negative(ids, known), (isinstance(many, fx.Node) or many > 0) and not _fewer(ids, many)
    if not below and not above:
        return
    with graph.inserting_before(node):
        tests = [call(graph, aten.lt.Scalar, ids, 0)] * below + [call(graph, aten.ge.Scalar, ids, many)] * above
        outside = functools.reduce(functools.partial(call, graph, aten.logical_or.default), tests)
        if node.target in (aten.nll_loss_nd.default, aten.cross_entropy_loss.default):
            ignored = node.args[_IGNORE] if len(node.args) > _IGNORE else node.kwargs.get("ignore_index", -100)
            outside = call(graph, aten.logical_and.default, outside, call(graph, aten.ne.Scalar, ids, ignored))
        place = call(graph, aten.mul.Tensor, call(graph, aten.any.default, outside), 2)
        table = call(graph, aten.new_zeros.default, place, [2])  # of two: of one it would be a check of expert ids
        zero = call(graph, aten.index_select.default, table, 0, call(graph, aten.reshape.default, place, [1]))
        node.update_arg(at, call(graph, aten.add.Tensor, ids, call(graph, aten.select.int, zero, 0, 0)))


def _checked(graph: fx.Graph, index: fx.Node) -> fx.Node:
    value = index.meta["val"]
    with graph.inserting_after(index):
        below = graph.call_function(aten.lt.Scalar, (index, 0))
    below.meta["val"] = value < 0
    with graph.inserting_after(below):
        checked = graph.call_function(aten.where.ScalarSelf, (below, _BEYOND, index))
    checked.meta["val"] = value.clone()
    for made in (below, checked):
        made.meta |= {k: v for k, v in index.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return checked


def _not_negative(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    if node not in known:
        known[node] = False
        known[node] = _made_not_negative(node, known)
    return known[node]


def _made_not_negative(node: PyObject, known: dict[fx.Node, bool]) -> bool:
    if node.op != "call_function":
        return False
    name = op_name(node)
    if name in _NOT_NEGATIVE or _is_bool(node):
        return True
    if node.target is operator.getitem and op_name(node.args[0]) in _VALUES_AND_PLACES:
        return node.args[1] == 1 or _not_negative(node.args[0].args[0], known)
    at = _FILLED_WITH.get(node.target)
    if at is not None and any(_below(a) for a in (*node.args[at:], *node.kwargs.values())):
        return False
    below = any(map(_below, (*node.args, *node.kwargs.values()))) and not moves_rows(node)  # not an axis
    if is_factory(node):
        return not below and name not in ("full", "full_like", "new_full", "empty", "empty_like", "new_empty")
    if moves_rows(node) and name not in _OF_SEVERAL:
        return _not_negative(node.all_input_nodes[0], known)
    operands = [n for n in node.all_input_nodes if not _is_bool(n)]
    return name in (*_KEEP, *_OF_SEVERAL) and not below and all(_not_negative(n, known) for n in operands)


def _fewer(node: PyObject, many: PyObject) -> bool:
    """Whether ``node`` says which of at most ``many`` columns is the largest, or where a sort puts which."""
    if node.op != "call_function" or node.target in _FILLED_WITH:
        return False
    found = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else node
    if op_name(found) in (*_VALUES_AND_PLACES, "argmax", "argmin", "argsort") and (node is not found) == (
        op_name(found) in _VALUES_AND_PLACES
    ):
        names = [a.name for a in found.target._schema.arguments if not a.kwarg_only]
        defaults = {a.name: a.default_value for a in found.target._schema.arguments}
        dim = (defaults | dict(zip(names, found.args, strict=False)) | found.kwargs).get("dim")
        value = found.args[0].meta["val"]
        size = value.shape[dim] if isinstance(dim, int) and value.dim() else value.numel()
        return statically_known_true(size <= (many.meta["val"] if isinstance(many, fx.Node) else many))
    moved = moves_rows(node) and op_name(node) not in _OF_SEVERAL and node.all_input_nodes
    return bool(moved) and _fewer(node.all_input_nodes[0], many)


def _below(argument: PyObject) -> bool:
    return isinstance(argument, int | float) and argument < 0


def _is_bool(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool

"""Calls that torch's exporter translates in one spelling only, in a traced graph, written in that spelling.

view                            reshape: attention's result has several layouts in the exporter's stages, and a
                                view of one fails in another
scaled_dot_product_attention    contiguous
avg_pool with a divisor         the mean of a window times its size over the divisor, which the exporter leaves out
adaptive pools of a free size   means and maxima of slices (:mod:`~.adaptive_pools`)
layers and means of no rows     :mod:`~.no_rows`
cross_entropy                   of shares, or with label_smoothing, as sums (:mod:`~.cross_entropy`)
scatter, scatter_add            of no more of the source than there are indices
indices of 32 bits              of 64, where a tensor is indexed by several at once
split, chunk of a free size     slices: the optimiser of the graph stops at a list of parts of unknown size
sizes that were settled late    numbers: of ``weight * x``, x has the weight's size, also where x was made before
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moeopt.errors import NotSaveableError
from moeopt.lower.onnx.adaptive_pools import ADAPTIVE_POOLS, write_adaptive_pool
from moeopt.lower.onnx.cross_entropy import write_cross_entropy
from moeopt.lower.onnx.graph_calls import call
from moeopt.lower.onnx.no_rows import around_no_rows
from moeopt.value_types import PyObject

aten = torch.ops.aten
_SOURCES = (aten.scatter.src, aten.scatter_add.default)


def around_gaps(graph: fx.Graph) -> None:
    """Change ``graph`` in place; what the graph computes stays."""
    _settle_sizes(graph)
    around_no_rows(graph)
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.target is aten.scaled_dot_product_attention.default:
            _settle_attention(graph, node)
        elif node.target in ADAPTIVE_POOLS:
            write_adaptive_pool(graph, node)
        elif node.target in (aten.avg_pool2d.default, aten.avg_pool3d.default):
            _divide_windows(graph, node)
        elif node.target in (aten.split.Tensor, aten.chunk.default, aten.unsafe_split.Tensor):
            _slice_free_parts(graph, node)
        elif node.target is aten.cross_entropy_loss.default:
            write_cross_entropy(graph, node)
        elif node.target in _SOURCES:
            _cut_source(graph, node)
        elif node.target in (aten.index.Tensor, aten.index_put.default):
            _wide_indices(graph, node)


def _settle_sizes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, FakeTensor):
            continue
        sizes = [_known(size) for size in value.shape]
        if any(new is not old for new, old in zip(sizes, value.shape, strict=True)):
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device=value.device)


def _known(size: int | torch.SymInt) -> int | torch.SymInt:
    number: int | None = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if number is None else number


def _cut_source(graph: fx.Graph, node: PyObject) -> None:
    """PyTorch reads the part of the source that has an index; ONNX takes no other source."""
    source, sizes = node.args[3], node.args[2].meta["val"].shape
    for dim, size in enumerate(sizes):
        if not statically_known_true(source.meta["val"].shape[dim] == size):
            with graph.inserting_before(node):
                end = call(graph, aten.sym_size.int, node.args[2], dim)
                source = call(graph, aten.slice.Tensor, source, dim, 0, end)
    node.update_arg(3, source)


def _wide_indices(graph: fx.Graph, node: PyObject) -> None:
    indices = list(node.args[1])
    for number, index in enumerate(indices):
        if index is not None and index.meta["val"].dtype == torch.int32:
            with graph.inserting_before(node):
                indices[number] = call(graph, aten.to.dtype, index, torch.int64)
    node.update_arg(1, indices)


def _settle_attention(graph: fx.Graph, node: PyObject) -> None:
    with graph.inserting_after(node):
        copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta = dict(node.meta)
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def _divide_windows(graph: fx.Graph, node: PyObject) -> None:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    divisor = given.pop("divisor_override", None)
    if divisor is None:
        return
    if given.get("ceil_mode", False):
        raise NotSaveableError(
            f"{node.target} with divisor_override and ceil_mode has no ONNX form; use backend='torch', or pad the input"
        )
    kernel, many = given["kernel_size"], 2 if node.target is aten.avg_pool2d.default else 3
    size = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** many
    node.args = (given.pop("input"),)
    node.kwargs = given | {"count_include_pad": True}
    with graph.inserting_after(node):
        sums = graph.call_function(aten.mul.Tensor, (node, size / divisor))
    sums.meta = dict(node.meta)
    sums.name, node.name = node.name, sums.name  # the program's signature knows its results by name
    node.replace_all_uses_with(sums, delete_user_cb=lambda user: user is not sums)


def _slice_free_parts(graph: fx.Graph, node: PyObject) -> None:
    """Each part as a slice, where the size that is divided is not known: the number of parts is."""
    x, given, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    if not isinstance(x, fx.Node) or not isinstance(dim, int):
        return
    size = x.meta["val"].shape[dim]
    width = given if node.target is not aten.chunk.default else None
    if isinstance(size, int) and not isinstance(width, fx.Node):
        return
    with graph.inserting_before(node):
        if width is None:
            whole = call(graph, aten.sym_size.int, x, dim)
            width = call(graph, operator.floordiv, call(graph, operator.add, whole, given - 1), given)
    for part in list(node.users):
        number = part.args[1]
        with graph.inserting_before(part):
            ends = [call(graph, operator.mul, width, n) for n in (number, number + 1)]
            found = call(graph, aten.slice.Tensor, x, dim, *ends)
        found.meta["val"] = part.meta["val"]  # of its own size: the last part may be smaller than the others
        found.meta["stack_trace"] = node.meta.get("stack_trace", "")
        part.replace_all_uses_with(found)
        graph.erase_node(part)
        found.name = part.name  # the program's signature knows its results by name
    graph.erase_node(node)

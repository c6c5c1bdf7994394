"""Composite ops as the ops that they stand for, where a look at their values tells which: no trace is needed for them.

torch.onnx traces each program once more to take composite ops apart. Of those that it takes apart, most programs hold
only ones that become one other op, or none:

    to(x, ...)            x; ``_to_copy`` where its dtype is another one
    contiguous(x)         clone(x), contiguous
    dropout(x, p, False)  clone(x)
    chunk(x, n, d)        split(x, ceil(size / n), d)
    square(x)             pow(x, 2)
    a & b, a | b, a ^ b   bitwise_and(a, b), bitwise_or(a, b), bitwise_xor(a, b)

A program that holds others is traced all the same; these are then as they would have come out.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from moeopt.value_types import PyObject

aten = torch.ops.aten
_TO = (aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other)
_OTHER_NAMES = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
}


def composites_written_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program of the same numbers without such ops; itself where its ops, or graphs inside it, may write to values.

    A value that is written to may be the same as ``x`` of ``to(x)``, or another one: a trace tells them apart.
    """
    if any(_may_write(node) for node in program.graph.nodes):
        return program
    program = copy.copy(program)
    graph = copy.deepcopy(program.graph)
    for node, own in zip(program.graph.nodes, graph.nodes, strict=True):
        own.name = node.name  # the signature knows inputs and outputs by name, "input" among them
    results = {spec.arg.name for spec in program.graph_signature.output_specs if hasattr(spec.arg, "name")}
    for node in list(graph.nodes):
        _write_out(node, node.name in results)
    graph.eliminate_dead_code()
    program._graph_module = fx.GraphModule(program.graph_module, graph)
    return program


def _may_write(node: PyObject) -> bool:
    op = node.target
    return isinstance(op, torch._ops.HigherOrderOperator) or (
        isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
    )


def _write_out(node: PyObject, is_result: bool) -> None:
    """The op of a node as the op that it stands for; a result of the program stays a node of its own."""
    if node.target in _OTHER_NAMES:
        node.target = _OTHER_NAMES[node.target]
    elif node.target in _TO:
        source, value = node.args[0], node.meta["val"]
        given = source.meta["val"]
        if given.device != value.device or given.layout != value.layout:
            return
        if given.dtype != value.dtype:
            node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": value.dtype}
        elif is_result:
            node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
        else:
            node.replace_all_uses_with(source)
    elif node.target is aten.contiguous.default:
        node.target = aten.clone.default
        node.args, node.kwargs = node.args[:1], {"memory_format": torch.contiguous_format}
    elif _is_idle_dropout(node):
        node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}

    elif node.target is aten.square.default:
        node.target, node.args = aten.pow.Tensor_Scalar, (node.args[0], 2)
    elif node.target is aten.chunk.default:
        _split(node, *node.args, **node.kwargs)


def _split(node: PyObject, x: PyObject, chunks: int, dim: int = 0) -> None:
    size = x.meta["val"].shape[dim]
    if isinstance(size, int) and size > 0:
        node.target, node.args, node.kwargs = aten.split.Tensor, (x, -(-size // chunks), dim), {}


def _is_idle_dropout(node: PyObject) -> bool:
    return node.target is aten.dropout.default and tuple(node.args[2:]) == (False,)

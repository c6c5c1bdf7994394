"""Python numbers beside 16-bit tensors, as PyTorch reads them: the exporter makes tensors of them, of another dtype.

    x < c           c is rounded to x's dtype first (PyTorch compares in it); the exporter compares in float32
    x * c, x / c    computed in float32 with the whole c, then rounded; the exporter rounds c, which is then 0 or
                    infinite where it lies beyond x's dtype. Only such constants go through float32: others lose no
                    more than the result does

Added numbers need neither: what is lost of them is lost in the sum.
"""

from __future__ import annotations

import copy

import torch

from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
_COMPARED = (aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.eq.Scalar, aten.ne.Scalar)
_MULTIPLIED = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)


def numbers_as_read(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with such numbers rewritten; itself where there is none."""
    if not any(_rounded(node) for node in program.graph.nodes):
        return program
    program = copy.copy(program)
    graph = copy.deepcopy(program.graph)
    for node in [n for n in graph.nodes if _rounded(n)]:
        x, number = node.args
        if node.target in _COMPARED:
            node.args = (x, _in(x.meta["val"].dtype, number))
            continue
        with graph.inserting_before(node):
            wide = _call(graph, aten._to_copy.default, x, dtype=torch.float32)
            product = _call(graph, node.target, wide, number)
            whole = _call(graph, aten._to_copy.default, product, dtype=x.meta["val"].dtype)
        name = node.name
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        whole.name = name  # the signature knows results by their names
    program._graph_module = torch.fx.GraphModule(program.graph_module, graph)
    return program


def _rounded(node: torch.fx.Node) -> bool:
    """Whether the number of ``node`` would be read otherwise than PyTorch reads it."""
    if node.target not in (*_COMPARED, *_MULTIPLIED) or node.kwargs or len(node.args) != 2:
        return False
    x, number = node.args
    value = x.meta.get("val") if isinstance(x, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(number, float):
        return False
    if value.dtype not in (torch.float16, torch.bfloat16):
        return False
    stays = _in(value.dtype, number)
    if node.target in _COMPARED:
        return stays != number
    return abs(stays - number) > torch.finfo(value.dtype).eps * abs(number)


def _in(dtype: torch.dtype, number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32).to(dtype))


def _call(
    graph: torch.fx.Graph, target: FxTarget, value: torch.fx.Node, *rest: PyObject, **options: PyObject
) -> torch.fx.Node:
    node = graph.call_function(target, (value, *rest), options)
    node.meta["val"] = target(value.meta["val"], *rest, **options)
    return node

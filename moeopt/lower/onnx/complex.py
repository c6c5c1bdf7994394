"""Sizes of one in complex tensors are put in and taken out of their real view: the exporter has no complex form.

    unsqueeze(z, d)  ->  view_as_complex(unsqueeze(view_as_real(z), d))        d counted from the front

Seen in the rotary embedding of Llama 4.
"""

from __future__ import annotations

import copy

import torch

from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten


def through_real_views(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with every ``unsqueeze`` of a complex tensor rewritten; itself where there is none."""
    if not any(_is_one(node) for node in program.graph.nodes):
        return program
    program = copy.copy(program)
    graph = copy.deepcopy(program.graph)
    for node in [n for n in graph.nodes if _is_one(n)]:
        value, dim = node.args
        rank = value.meta["val"].dim()
        with graph.inserting_before(node):
            real = _call(graph, aten.view_as_real.default, value)
            wide = _call(graph, aten.unsqueeze.default, real, dim % (rank + 1))
            whole = _call(graph, aten.view_as_complex.default, wide)
        whole.meta["stack_trace"] = node.meta.get("stack_trace", "")
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    program._graph_module = torch.fx.GraphModule(program.graph_module, graph)
    return program


def _is_one(node: torch.fx.Node) -> bool:
    if node.target != aten.unsqueeze.default or not isinstance(node.args[0], torch.fx.Node):
        return False
    value = node.args[0].meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _call(graph: torch.fx.Graph, target: FxTarget, value: torch.fx.Node, *rest: PyObject) -> torch.fx.Node:
    node = graph.call_function(target, (value, *rest))
    node.meta["val"] = target(value.meta["val"], *rest)
    return node

"""Calls that are written into a traced graph, with their values."""

from __future__ import annotations

from torch import fx

from moeopt.value_types import FxTarget, PyObject


def call(graph: fx.Graph, target: FxTarget, *args: PyObject, **kwargs: PyObject) -> PyObject:
    """A call of ``target`` with its value; the value itself where no argument is a node."""
    values = fx.map_arg(args, lambda node: node.meta["val"])
    node = graph.call_function(target, args, kwargs)
    if not node.all_input_nodes:
        graph.erase_node(node)
        return target(*args, **kwargs)
    node.meta["val"] = target(*values, **fx.map_arg(kwargs, lambda node: node.meta["val"]))
    return node

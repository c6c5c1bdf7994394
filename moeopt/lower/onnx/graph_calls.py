"""Calls that are written into a traced graph, with their values."""

from __future__ import annotations

from torch import fx

from moeopt.value_types import FxTarget, PyObject


def call(graph: fx.Graph, target: FxTarget, *args: PyObject) -> PyObject:
    """A call of ``target`` with its value; the value itself where no argument is a node."""
    if not any(isinstance(value, fx.Node) for value in args):
        return target(*args)
    node = graph.call_function(target, args)
    node.meta["val"] = target(*[value.meta["val"] if isinstance(value, fx.Node) else value for value in args])
    return node

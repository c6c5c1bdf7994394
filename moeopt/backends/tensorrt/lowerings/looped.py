"""An ONNX ``Loop`` whose body is written with the same builder as the graph around it.

The body reads values of the surrounding graph by name: weights and constants belong to that graph and are stored once.
The loop has a condition that is always true: without one, TensorRT for RTX 1.7.1 runs eight turns at a time, each
with its own copy of an expert's weights, and plans five times the memory (measured: 102 MB against 20 MB).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moeopt.lower.onnx.build import Builder
from moeopt.value_types import OnnxValue

Body = Callable[..., tuple[list[Any], list[Any]]]


def looped(
    graph: Builder, name: str, trips: OnnxValue, carried: Sequence[Any], types: Sequence[Any], body: Body
) -> OnnxValue:
    """``body(i, *carried)`` ``trips`` times.

    Args:
        trips: int64 scalar.
        carried: values before the first turn, each with its (``onnx_ir`` dtype, shape) in ``types``.
        body: adds nodes and returns the carried values after the turn, and values to stack over the turns;
            ``i`` is an int64 scalar.

    Returns:
        The carried values after the last turn, then the stacked ones; the value itself where there is one.
    """
    import onnx_ir as ir

    def value(label: str, dtype: OnnxValue, shape: Sequence[Any]) -> OnnxValue:
        return ir.Value(name=f"{graph.prefix}/{name}/{label}", type=ir.TensorType(dtype), shape=ir.Shape(shape))

    turn, going = value("turn", ir.DataType.INT64, []), value("going", ir.DataType.BOOL, [])
    inside = [value(f"carried.{number}", *kind) for number, kind in enumerate(types)]
    outer, graph.nodes = graph.nodes, []
    try:
        after, stacked = body(turn, *inside)
        goes_on = graph.op("Identity", [going], name=f"{name}/goes_on")
        nodes = graph.nodes
    finally:
        graph.nodes = outer
    goes_on.type, goes_on.shape = going.type, going.shape
    ends = ir.Graph([turn, going, *inside], [goes_on, *after, *stacked], nodes=nodes, name=f"{graph.prefix}/{name}")
    for end, (dtype, shape) in zip(after, types, strict=True):
        end.type, end.shape = ir.TensorType(dtype), ir.Shape(shape)
    count = len(after) + len(stacked)
    return graph.op("Loop", [trips, graph.const(True, "bool"), *carried], outputs=count, name=name, body=ends)

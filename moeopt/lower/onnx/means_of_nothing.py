"""Means over as many elements as data decide, in a translated graph: of none they are NaN, as in PyTorch.

    ReduceMean(x, axes)  ->  Where(product of the sizes of x along axes == 0, NaN, ReduceMean(x, axes))

ONNX Runtime's ReduceMean of nothing is 0. Here every one is met that a translation wrote: for ``mean``, for a loss, for
the mean and variance of a norm, for a pool. Means over sizes of the inputs stay as they are, since an engine refuses
inputs without rows, and runtimes fuse them.
"""

from __future__ import annotations

import math
import re

from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

_CHOSEN = re.compile(r"\bu\d+\b")
"""A size that data decide, in torch's names of sizes."""


def means_of_nothing(graph: OnnxGraph) -> None:
    """Change ``graph`` and the graphs inside it in place."""
    nodes = list(graph.all_nodes())
    if not any(_chosen(value) for node in nodes for value in node.outputs):
        return
    for node in nodes:
        if node.op_type == "ReduceMean" and not node.domain and _over_chosen(node):
            _replace(node)


def _chosen(value: OnnxValue) -> bool:
    return value.shape is not None and any(_CHOSEN.search(str(size)) for size in value.shape)


def _over_chosen(node: OnnxNode) -> bool:
    """Whether data may decide a size that is reduced: unless the shape says that they do not."""
    import onnx_ir as ir

    (x, *given), axes = node.inputs, None
    if given and given[0] is not None:
        constant = ir.convenience.get_const_tensor(given[0])
        axes = None if constant is None else constant.numpy().reshape(-1).tolist()
    if x.shape is None:
        return True
    return any(_CHOSEN.search(str(x.shape[d])) for d in (range(len(x.shape)) if axes is None else axes))


def _replace(node: OnnxNode) -> None:
    import onnx_ir as ir

    x, *axes = node.inputs
    made = [ir.node("ReduceMean", list(node.inputs), dict(node.attributes))]

    def add(op: str, *inputs: OnnxValue, **attributes: int | float) -> OnnxValue:
        made.append(ir.node(op, inputs, attributes))
        return made[-1].outputs[0]

    mean, sizes = made[0].outputs[0], add("Shape", x)
    if axes and axes[0] is not None:
        sizes = add("Gather", sizes, axes[0])
    nothing = add("Equal", add("ReduceProd", sizes, keepdims=0), add("Constant", value_int=0))
    result = add("Where", nothing, add("CastLike", add("Constant", value_float=math.nan), mean), mean)
    old = node.outputs[0]
    result.type, result.shape, result.name = old.type, old.shape, old.name
    node.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)

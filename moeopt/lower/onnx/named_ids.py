"""Whether expert ids of a graph can name anything but an expert, read off the nodes that make them.

TopK over E scores gives indices 0 .. E - 1, whatever the scores are, NaN too
"""

from __future__ import annotations

from moeopt.value_types import OnnxValue

_SAME_NUMBERS = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Ops that give some or all numbers of their first input; a Cast of ids goes to integers that hold them."""


def always_named(ids: OnnxValue, experts: int) -> bool:
    """Whether ``ids``, an ``onnx_ir`` value, are indices of a TopK over at most ``experts`` numbers."""
    while (node := ids.producer()) is not None and not node.domain and node.op_type in _SAME_NUMBERS:
        if node.op_type == "Cast" and node.attributes["to"].as_int() not in _whole(experts):
            return False
        ids = node.inputs[0]
    if node is None or node.domain or node.op_type != "TopK" or ids is not node.outputs[1]:
        return False
    scores, axis = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    size = None if scores.shape is None else scores.shape[axis]
    return isinstance(size, int) and size <= experts


def _whole(experts: int) -> list[int]:
    """Integer types that hold 0 .. experts - 1, by their numbers in ``onnx.TensorProto``."""
    import onnx_ir as ir

    return [int(ir.DataType.INT64), *([int(ir.DataType.INT32)] if experts <= 1 << 31 else [])]

"""Roundings to 16 bits that a graph keeps when its 16-bit values are widened to float32.

Most of them are noise, and without them a result lies nearer to the exact one. Two kinds are part of the function:

    logits.half().softmax(-1)                   in a graph of wider weights every 16-bit value was asked for: it is
                                                rounded, and overflows, as it did
    mask.bfloat16().cumsum(0) <= capacity       a count above 256 is rounded to an even number, and decides which tokens
                                                are dropped; of whole numbers no rounding is noise

A value is rounded by a Cast to its own dtype and one back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moeopt.errors import NotSaveableError
from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue

_COUNTS = ("Add", "Sub", "Mul", "Sum", "CumSum", "ReduceSum", "MatMul", "Einsum", "Neg", "Abs", "Range")
"""Of whole numbers they make other whole numbers."""
_MOVES = (
    "Reshape", "Transpose", "Gather", "GatherElements", "GatherND", "Unsqueeze", "Squeeze", "Concat", "Slice", "Expand",
    "Identity", "Where", "Max", "Min", "ReduceMax", "ReduceMin", "Clip", "Flatten", "Split", "Tile", "Pad",
    "ConstantOfShape", "Constant", "OneHot", "Trilu", "Relu", "ScatterElements", "ScatterND",
)  # fmt: skip
"""What they give are numbers that they were given."""
SMALL = 16
"""Elements of a constant that is looked at."""


def kept_roundings(model: OnnxModel) -> list[tuple[OnnxValue, Any]]:
    """The 16-bit values of an ``onnx_ir.Model`` that stay rounded, each with its dtype; asked before it is widened.

    Raises:
        NotSaveableError: it adds up whole numbers one by one, each sum rounded: of ones no bfloat16 gets beyond 256.
    """
    import onnx_ir as ir

    narrow = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    asked_for = not any(v.dtype in narrow and v.const_value.size > SMALL for v in model.graph.initializers.values())
    whole: set[int] = set()
    kept: dict[int, tuple[OnnxValue, Any]] = {}
    for node in model.graph.all_nodes():
        counts, exact = _of_whole_numbers(node, whole), _exact(node)
        if counts:
            whole.update(map(id, node.outputs))
            if node.op_type == "ScatterND" and _adds(node) and node.outputs[0].dtype in narrow:
                raise NotSaveableError(
                    f"it counts in {node.outputs[0].dtype.name.lower()} by index_add or index_put, one by one, which "
                    "stops where a sum is rounded down, and an engine's count does not; count in int64 or float32"
                )
        if (asked_for or counts) and not exact:
            kept.update((id(value), (value, value.dtype)) for value in node.outputs if value.dtype in narrow)
    return list(kept.values())


def round_again(values: Iterable[tuple[OnnxValue, Any]]) -> None:
    """Round ``values``, which are float32 by now, in place."""
    import onnx_ir as ir

    for value, dtype in values:
        node = value.producer()
        narrow, wide = (ir.node("Cast", [value], {"to": to}) for to in (dtype, ir.DataType.FLOAT))
        for cast, to in ((narrow, dtype), (wide, ir.DataType.FLOAT)):
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(to), value.shape
        ir.convenience.replace_all_uses_with(value, wide.outputs[0])
        narrow.replace_input_with(0, value)
        wide.replace_input_with(0, narrow.outputs[0])
        node.graph.insert_after(node, [narrow, wide])


def _exact(node: OnnxNode) -> bool:
    """Whether what ``node`` gives needs no rounding: it was given it, or makes it of flags or bytes."""
    import onnx_ir as ir

    if node.op_type == "Cast":
        return node.inputs[0].dtype in (ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8)
    return bool(node.domain) or (node.op_type in _MOVES and not _adds(node))


def _adds(node: OnnxNode) -> bool:
    """Whether it scatters by adding."""
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.as_string() == "add"


def _of_whole_numbers(node: OnnxNode, whole: set[int]) -> bool:
    """Whether the floats that ``node`` computes are whole numbers, for all that their makers show."""
    if node.domain:
        return False
    if node.op_type == "Cast" and node.inputs[0].dtype is not None and not node.inputs[0].dtype.is_floating_point():
        return True
    if node.op_type == "Constant" or (node.op_type == "ConstantOfShape" and "value" in node.attributes):
        attribute = node.attributes.get("value")
        return attribute is not None and _is_whole(attribute.value)
    if node.op_type not in (*_COUNTS, *_MOVES, "Cast"):
        return False
    floats = [v for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point()]
    return bool(floats) and all(id(v) in whole or _is_whole(v.const_value) for v in floats)


def _is_whole(tensor: OnnxValue) -> bool:
    """Whether a small constant holds whole numbers, or infinities, which mask."""
    import numpy as np

    if tensor is None or tensor.size > SMALL:
        return False
    numbers = tensor.numpy().astype(np.float64)
    return bool(((numbers == np.round(numbers)) | np.isinf(numbers)).all())

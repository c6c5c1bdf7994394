"""Flags and small integers on ONNX Runtime's CPU: an op without a kernel for them runs on wider integers.

The ONNX standard, or the provider, has no ``Where`` of booleans, no ``Max`` of int16, no ``OneHot`` of int32. Every
bool, int8, uint8, int16 and uint16 is an int32 and every int32 an int64, so a Cast before and a Cast after give the
same result: of flags, a sum is an "or" and a product an "and", as in PyTorch.
"""

from __future__ import annotations

from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue

_BOOL, _INT32, _INT64, _FLOAT, _DOUBLE = 9, 6, 7, 1, 11
_SMALL = (_BOOL, 2, 3, 4, 5)
"""bool, uint8, int8, uint16, int16."""

_ALL = None
_SAME: dict[str, tuple[tuple[int, ...] | None, bool]] = {
    "Where": ((1, 2), True),
    "CumSum": ((0,), True),
    "TopK": ((0,), True),
    "Trilu": ((0,), True),
    "Pad": ((0, 2), True),
    "Unique": ((0,), True),
    "ArgMax": ((0,), False),
    "ArgMin": ((0,), False),
    "ScatterElements": ((0, 2), True),
    "ScatterND": ((0, 2), True),
    **dict.fromkeys(("Less", "Greater", "LessOrEqual", "GreaterOrEqual"), (_ALL, False)),
    **dict.fromkeys(
        ("Max", "Min", "Mod", "Add", "Sub", "Mul", "Div", "Pow", "Abs", "Neg", "Sign", "Clip", "Relu", "Sum", "MatMul",
         "Gemm", "Einsum"), (_ALL, True),
    ),
    **dict.fromkeys(
        ("ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
        ((0,), True),
    ),
}  # fmt: skip
"""Which inputs have the numbers' dtype (``_ALL``: every one), and whether the first output has it too."""


def cast_narrow(model: OnnxModel) -> None:
    """Put casts around the nodes of an ``onnx_ir.Model`` that the CPU provider has no kernel for, in place."""
    for node in list(model.graph.all_nodes()):
        if node.domain:
            continue
        if node.op_type == "OneHot":
            _cast(node, (0,), _SMALL + (_INT32, _FLOAT), _INT64, result=False)
            _cast(node, (2,), (*_SMALL, _INT32), _INT64, result=True)
        elif node.op_type == "NonZero":
            _cast(node, (0,), (*_SMALL[2:], _DOUBLE), _BOOL, result=False)
        elif node.op_type == "IsNaN":
            _cast(node, (0,), (*_SMALL, _INT32, _INT64), _FLOAT, result=False)
        elif node.op_type in _SAME:
            inputs, result = _SAME[node.op_type]
            places = range(len(node.inputs)) if inputs is _ALL else inputs
            _cast(node, places, _SMALL, _INT32, result=result)
            if node.op_type in ("Unique", "Gemm"):
                _cast(node, places, (_INT32,), _INT64, result=result)


def _cast(node: OnnxNode, places: OnnxValue, narrow: tuple[int, ...], wide: int, *, result: bool) -> None:
    """Inputs of ``node`` at ``places`` as ``wide`` where they are ``narrow``; with ``result``, its output as it was."""
    import onnx_ir as ir

    given = [p for p in places if p < len(node.inputs) and node.inputs[p] is not None]
    if not given or node.inputs[given[0]].dtype is None or int(node.inputs[given[0]].dtype) not in narrow:
        return
    own = node.inputs[given[0]].dtype
    for place in given:
        value = node.inputs[place]
        cast = ir.node("Cast", [value], {"to": wide}, name=f"{node.name}/input_{place}")
        cast.outputs[0].name, cast.outputs[0].shape = cast.name, value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType(wide))
        node.graph.insert_before(node, cast)
        node.replace_input_with(place, cast.outputs[0])
    if not result:
        return
    found = node.outputs[0]
    back = ir.node("Cast", [found], {"to": int(own)}, name=f"{node.name}/output")
    back.outputs[0].type, back.outputs[0].shape = ir.TensorType(own), found.shape
    ir.convenience.replace_all_uses_with(found, back.outputs[0], replace_graph_outputs=True)
    back.replace_input_with(0, found)
    back.outputs[0].name, found.name = found.name, f"{found.name}/wide"
    found.type = ir.TensorType(ir.DataType(wide))
    node.graph.insert_after(node, back)

"""The nodes of a graph that stop a call whose expert ids are outside of what was verified say so by their names.

``moeopt.rewrite.id_range`` looks an id outside up in a table of one zero, where it is out of bounds; the error
shows the name of the node.
"""

from __future__ import annotations

from moeopt.value_types import PyObject

OUTSIDE = "the expert ids of this call are outside the range that was verified"


def name_id_guards(model: PyObject) -> int:
    """Name each such lookup of an ``onnx_ir.Model``; how many there are."""
    found = 0
    for node in model.graph:
        table = node.inputs[0].const_value if node.op_type == "Gather" and node.inputs[0] is not None else None
        if table is not None and tuple(table.shape) == (1,) and table.dtype.is_integer() and not table.numpy().any():
            node.name = OUTSIDE if not found else f"{OUTSIDE} ({found + 1})"
            found += 1
    return found

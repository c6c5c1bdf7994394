"""What is said where ONNX Runtime has no kernel for a node of a graph: the op, its dtype, and the model's line."""

from __future__ import annotations

import re

from moeopt.value_types import OnnxModel

STACK = "pkg.torch.onnx.stack_trace"
"""Where the exporter keeps the model's lines, until nodes get the names of their blocks."""
_MISSING = re.compile(r"Could not find an implementation for (\w+)\(")


def lines_of_float64(model: OnnxModel) -> dict[str, str]:
    """By op, the model's line of its first node that reads float64; "" where no line is known."""
    import onnx_ir as ir

    found: dict[str, str] = {}
    for node in model.graph.all_nodes():
        if any(value is not None and value.dtype == ir.DataType.DOUBLE for value in node.inputs):
            found[node.op_type] = found.get(node.op_type) or _line(node.metadata_props.get(STACK, ""))
    return found


def _line(stack: str) -> str:
    lines = [line.strip() for line in stack.splitlines() if line.strip().startswith("File ")]
    return lines[-1] if lines else ""


def missing_kernel(error: str, float64: dict[str, str], runtime: str) -> str:
    """The reason that an error of ONNX Runtime stands for, "" where it speaks of no missing kernel.

    Args:
        float64: of :func:`lines_of_float64`.
        runtime: the runtime, its version and its provider, in words.
    """
    named = _MISSING.search(error)
    if named is None:
        return ""
    op = named[1]
    if op not in float64:
        return f"{runtime} has no kernel for {op}: write that function with other ops, or use backend='torch'"
    where = f" ({float64[op]})" if float64[op] else ""
    return (
        f"{runtime} has no kernel for {op} of float64{where}: export a float32 copy of the model, compute that line in "
        "float32, or use backend='torch'"
    )

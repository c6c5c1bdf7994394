"""``portable=True``: an engine's graph holds operators that ONNX itself defines, and no others."""

from __future__ import annotations

from moeopt.errors import NotSaveableError
from moeopt.value_types import OnnxModel


def check_portable(model: OnnxModel) -> None:
    """Hold a lowered ``onnx_ir.Model`` to ONNX's own operators, and drop the domains that it no longer uses.

    Raises:
        NotSaveableError: it holds another operator; the message names it and its node.
    """
    import onnx

    opset = model.graph.opset_imports.get("", 1)
    for node in model.graph.all_nodes():
        if node.domain or not onnx.defs.has(node.op_type, opset, ""):
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise NotSaveableError(
                f"portable=True: {name} (node {node.name}) is no operator of ONNX {opset}, and stands for a part of "
                "the model that has no other form here; leave portable out, or write that part with other ops"
            )
    for domain in [d for d in model.graph.opset_imports if d not in ("", "ai.onnx")]:
        del model.graph.opset_imports[domain]

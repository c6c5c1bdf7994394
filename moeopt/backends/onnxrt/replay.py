"""The plan of an engine whose provider this machine lacks: lowered for that provider, computed and checked on CPU.

The graph is lowered twice. One form is for the provider; it is emitted and checked, and not run. The other, the
CPU fallback graph, is for CPU; it is what blocks are verified through and what a bundle replays.
"""

from __future__ import annotations

import os

from moeopt.backends.onnxrt.capability import DOMAIN, check_graph
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.errors import NotSaveableError
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.value_types import PyObject


class ReplayPlan(OrtPlan):
    """A CPU plan for blocks that ``target`` carries; ``Declined`` for all others, with the target's reasons.

    Attributes:
        target: the plan of the provider that the engine is for.
    """

    native = False

    def __init__(self, target: OrtPlan) -> None:
        super().__init__("cpu", target.tokens, portable=target.portable)
        self.target = target

    def check(self, site: ExpertsNode) -> None:
        self.target.choice(site)


_THEIR_OWN = ("SimplifiedLayerNormalization",)
"""Operators that ONNX Runtime defines in ONNX's own domain; onnx has no schema for them."""


def check_emitted(model: PyObject, path: str, provider: str) -> None:
    """Hold an emitted graph to ONNX's checker and shape inference, and to what ``provider`` honours.

    Args:
        model: the ``onnx_ir.Model``; ``path``: where it was written.

    Raises:
        NotSaveableError: the message has the node and the fact.
    """
    problems = check_graph(model, provider) or _onnx_problems(path)
    if problems:
        raise NotSaveableError(
            f"the graph for {provider} is not one that it runs: {problems[0]}; use backend='torch', or report this "
            "with the model's code"
        )


def _onnx_problems(path: str) -> list[str]:
    """What onnx's checker and strict shape inference say of a written graph; operators of ONNX Runtime are opaque."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    opaque = [node for node in proto.graph.node if node.op_type in _THEIR_OWN and not node.domain]
    for node in opaque:
        node.domain = DOMAIN
    if opaque and DOMAIN not in [opset.domain for opset in proto.opset_import]:
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    checked = f"{path}.checked"  # beside its weights, which the checker wants to see
    try:
        onnx.save(proto, checked)
        onnx.checker.check_model(checked)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        return [" ".join(str(err).split())[:300]]
    finally:
        os.unlink(checked)
    return []

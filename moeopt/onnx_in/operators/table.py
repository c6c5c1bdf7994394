"""Every operator that the interpreter runs, by domain."""

from __future__ import annotations

from collections.abc import Callable

from moeopt.onnx_in.operators.call import NodeCall
from moeopt.onnx_in.operators.movement import MOVEMENT
from moeopt.onnx_in.operators.pointwise import CONTRIB_POINTWISE, POINTWISE
from moeopt.onnx_in.operators.products import CONTRIB_PRODUCTS, PRODUCTS
from moeopt.onnx_in.operators.reductions import REDUCTIONS
from moeopt.value_types import OnnxNode, PyObject

CONTRIB = "com.microsoft"

OPERATORS: dict[tuple[str, str], Callable[[NodeCall], PyObject]] = {
    **{("", name): run for name, run in {**POINTWISE, **MOVEMENT, **REDUCTIONS, **PRODUCTS}.items()},
    **{(CONTRIB, name): run for name, run in {**CONTRIB_POINTWISE, **CONTRIB_PRODUCTS}.items()},
}


def operator_of(node: OnnxNode) -> tuple[str, str]:
    """The domain and the operator of a node, "" for ONNX's own domain, which has two names."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def shown(domain: str, op_type: str) -> str:
    """An operator's name, its domain ahead where that is not ONNX's own."""
    return f"{domain}.{op_type}" if domain else op_type


def known(domain: str, op_type: str) -> bool:
    """Whether the interpreter runs an operator."""
    return (domain, op_type) in OPERATORS or (domain, op_type) == ("", "Constant")

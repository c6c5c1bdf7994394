"""The nodes of a graph that compute on codes, and how they are let round what they read to int8.

com.microsoft::MatMulNBits   accuracy_level 4        blocks of the weight's own size
moeopt::ExpertsOnCodes       rounds 1                blocks of 32
"""

from __future__ import annotations

from collections.abc import Iterator

from moeopt.backends.onnxrt.check_bytes import graphs_of
from moeopt.backends.onnxrt.check_quantized import LEVEL, OP
from moeopt.backends.onnxrt.lowerings.quantized import ACCURACY_LEVELS
from moeopt.lower.onnx.experts_node import DOMAIN, ON_CODES
from moeopt.value_types import OnnxModel, OnnxNode, PyObject

ROUNDS = "rounds"
_LEVEL = "accuracy_level"


def products(proto: OnnxModel) -> Iterator[OnnxNode]:
    """Those of an ``onnx.ModelProto``, subgraphs included."""
    for graph in graphs_of(proto.graph):
        yield from (n for n in graph.node if n.op_type == OP or (n.domain, n.op_type) == (DOMAIN, ON_CODES))


def count_of(node: OnnxNode) -> int:
    """How many matrices of codes a node multiplies with."""
    if node.op_type == OP:
        return 1
    values = {a.name: a for a in node.attribute}
    E: int = values["experts"].i
    return E * (3 if values["rows"].s == b"separate" else 2)


def set_rounding(node: OnnxNode, rounds: bool) -> None:
    """Let a node of :func:`products` round what it reads, or read floats."""
    from onnx import helper

    values = {a.name: a for a in node.attribute}
    if node.op_type == OP:
        values[_LEVEL].i = LEVEL if rounds else ACCURACY_LEVELS[values["bits"].i]
        return
    kept = [a for name, a in values.items() if name != ROUNDS]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(ROUNDS, 1)] if rounds else kept)


def let_round(model: PyObject) -> None:
    """The same for all of an ``onnx_ir.Model``."""
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        name, number = (_LEVEL, LEVEL) if node.op_type == OP else (ROUNDS, 1)
        if node.op_type in (OP, ON_CODES):
            node.attributes[name] = ir.AttrInt64(name, number)

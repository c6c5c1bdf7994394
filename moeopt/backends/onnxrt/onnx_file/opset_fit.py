"""Nodes that were written for one opset, in a graph of another.

A file's own nodes keep their version. A new node may stand among them as it is where the operator takes the same inputs
and attributes in the file's version; a few are written otherwise in older ones. Where neither helps, the version of the
whole file is raised, if every one of its nodes is the same operator in the newer version too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeopt.errors import Declined
from moeopt.onnx_in.read import OnnxFile
from moeopt.value_types import OnnxGraph, OnnxModel, OnnxNode, OnnxValue

NEWEST_WRITTEN = 20
"""The opset that lowerings are written for."""


def fit_opset(file: OnnxFile, rewritten: OnnxModel) -> int:
    """Rewrite nodes of ``rewritten`` for the file's opset where that can be; returns the opset that the file must have.

    Raises:
        Declined: a node has no form in the file's opset, and the file's own nodes mean something else in a newer.
    """
    wanted = next((int(o.version) for o in rewritten.opset_import if o.domain in ("", "ai.onnx")), NEWEST_WRITTEN)
    have = file.opset
    _older_forms(rewritten.graph, have)
    misfit = next((n for n in all_nodes(rewritten.graph) if not same_operator(n, wanted, have)), None)
    if misfit is None:
        return have
    for version in range(have + 1, wanted + 1):
        if all(same_operator(n, wanted, version) for n in all_nodes(rewritten.graph)):
            changed = next((n for n in all_nodes(file.proto.graph) if not _same_version(n, have, version)), None)
            if changed is None:
                return version
            raise Declined(
                f"the file is of opset {have}, in which {misfit.op_type} cannot be written as the experts need "
                f"it, and its node {changed.name!r} ({changed.op_type}) means something else in opset {version}: "
                f"export the model again with opset_version={wanted}"
            )
    raise Declined(f"the file is of opset {have}, and {misfit.op_type} has no form there that the experts need")


def same_operator(node: OnnxNode, written: int, have: int) -> bool:
    """Whether a node written for opset ``written`` is the same operator, with the same inputs, in opset ``have``."""
    import onnx.defs

    if node.domain not in ("", "ai.onnx"):
        return True
    try:
        new = onnx.defs.get_schema(node.op_type, written, "")
        old = onnx.defs.get_schema(node.op_type, have, "")
    except onnx.defs.SchemaError:
        return False
    if new.since_version == old.since_version:
        return True
    if any(a.name not in old.attributes for a in node.attribute):
        return False
    count, least = (
        len(node.input),
        sum(1 for i in old.inputs if i.option == onnx.defs.OpSchema.FormalParameterOption.Single),
    )
    variadic = any(i.option == onnx.defs.OpSchema.FormalParameterOption.Variadic for i in old.inputs)
    return variadic or least <= count <= len(old.inputs)


def _same_version(node: OnnxNode, have: int, version: int) -> bool:
    import onnx.defs

    if node.domain not in ("", "ai.onnx"):
        return True
    try:
        now = onnx.defs.get_schema(node.op_type, have, "").since_version
        then = onnx.defs.get_schema(node.op_type, version, "").since_version
    except onnx.defs.SchemaError:
        return False
    return now == then or node.op_type in _TYPES_ONLY


_TYPES_ONLY = frozenset(
    ("Cast", "CastLike", "Constant", "ConstantOfShape", "Equal", "Flatten", "Identity", "If", "Loop", "Scan", "Reshape")
    + ("Shape", "Size", "Squeeze", "Transpose", "Unsqueeze", "Pad", "QuantizeLinear", "DequantizeLinear", "IsNaN")
    + ("IsInf", "Add", "Sub", "Mul", "Div", "Relu", "CumSum", "Pow", "Where", "LeakyRelu", "PRelu", "GreaterOrEqual")
    + ("LessOrEqual", "ScatterElements", "ScatterND", "Trilu", "Min", "Max")
)
"""Operators that, from opset 13 to 20, were given element types, or attributes that change nothing unless given."""


def all_nodes(graph: OnnxGraph) -> Iterator[Any]:
    """The nodes of a protobuf graph and of its bodies."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from all_nodes(body)


def _older_forms(graph: OnnxGraph, have: int) -> None:
    """Write axes that are an input as an attribute, equal parts of a split without their count, and no defaults."""
    import onnx

    constants = {t.name: t for t in graph.initializer} | {
        n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"
    }
    for node in all_nodes(graph):
        if have < 18 and node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            _axes_as_attribute(node, constants)
        if have < 14 and node.op_type == "Reshape" and node.input[1] in constants:
            if 0 not in onnx.numpy_helper.to_array(constants[node.input[1]]):
                _drop_attribute(node, "allowzero")
        if have < 18 and node.op_type == "Split" and len(node.input) < 2:
            _drop_attribute(node, "num_outputs")
        _drop_new_defaults(node, have)


def _axes_as_attribute(node: OnnxNode, constants: dict[str, OnnxValue]) -> None:
    import onnx

    if len(node.input) > 1 and node.input[1] in constants:
        axes = onnx.numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
        del node.input[1:]
        node.attribute.append(onnx.helper.make_attribute("axes", axes))


def _drop_new_defaults(node: OnnxNode, have: int) -> None:
    """Leave out attributes at their defaults that an older opset does not have: a new default is the old meaning."""
    import onnx.defs

    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return
    try:
        old = onnx.defs.get_schema(node.op_type, have, "")
    except onnx.defs.SchemaError:
        return
    new = onnx.defs.get_schema(node.op_type, NEWEST_WRITTEN, "").attributes
    for attribute in [a for a in node.attribute if a.name in new and a.name not in old.attributes]:
        if attribute == new[attribute.name].default_value:
            _drop_attribute(node, attribute.name)


def _drop_attribute(node: OnnxNode, name: str) -> None:
    for number in reversed(range(len(node.attribute))):
        if node.attribute[number].name == name:
            del node.attribute[number]

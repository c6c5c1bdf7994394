"""Two programs of one module in an ONNX ``If``: one for a single token that follows others, one for all else.

Shape legend: B rows, S tokens, P tokens before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeopt.lower.onnx.names import prefixed
from moeopt.value_types import OnnxModel, OnnxValue


def one_or_many(
    one: OnnxValue, many: OnnxValue, name: str, mask: OnnxValue, values: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Nodes that run ``one`` where S = 1 and P > 0, and ``many`` elsewhere.

    Args:
        one, many: ``onnx_ir`` models from ``values`` to as many results; only their initializers are left in them.
        name: begins the name of every node, value and weight.
        mask: (B, P + S); the first of ``values`` is (B, S, ...).

    Returns:
        the nodes in order, and the results.
    """
    import onnx_ir as ir

    single = ir.Value(name="1", const_value=ir.tensor([1]), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    one.graph.register_initializer(single)
    tokens = ir.node("Shape", [values[0]], {"start": 1, "end": 2}, name="tokens")
    length = ir.node("Shape", [mask], {"start": 1, "end": 2}, name="length")
    alone = ir.node("Equal", [tokens.outputs[0], single], name="one token")
    later = ir.node("Greater", [length.outputs[0], single], name="after others")
    both = ir.node("And", [alone.outputs[0], later.outputs[0]], name="one token after others")
    flag = ir.node("Squeeze", [both.outputs[0]], name="one step")
    before = [tokens, length, alone, later, both, flag]
    for node in before:
        node.outputs[0].name = node.name
    prefixed(name, before, [single])
    ends = list(many.graph.outputs)
    chosen = ir.node(
        "If",
        [flag.outputs[0]],
        {
            "then_branch": _branch(one, f"{name}/one", values, skip={id(single)}),
            "else_branch": _branch(many, f"{name}/many", values),
        },
        num_outputs=len(ends),
        name=f"{name}/If",
    )
    for number, (value, end) in enumerate(zip(chosen.outputs, ends, strict=True)):
        value.name, value.type, value.shape = f"{name}/If.{number}", end.type, end.shape
    return [*before, chosen], list(chosen.outputs)


def _branch(model: OnnxModel, name: str, values: Sequence[Any], skip: set[int] | None = None) -> OnnxValue:
    import onnx_ir as ir

    graph = model.graph
    inputs, ends = list(graph.inputs), []
    for number, value in enumerate(graph.outputs):
        node = ir.node("Identity", [value], name=f"result.{number}")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = node.name, value.type, value.shape
        ends.append(node)
    nodes = [*graph, *ends]
    graph.outputs.clear()
    graph.inputs.clear()
    graph.remove([*graph])
    for value, outer in zip(inputs, values, strict=True):
        ir.convenience.replace_all_uses_with(value, outer)
    prefixed(name, nodes, [v for v in graph.initializers.values() if id(v) not in (skip or set())])
    return ir.Graph([], [node.outputs[0] for node in ends], nodes=nodes, name=name)

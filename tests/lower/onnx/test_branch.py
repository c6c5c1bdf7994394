"""Two programs under one ``If``: which one runs, told by the numbers that it gives."""

import pytest
import torch

from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Session
from moeopt.errors import UsageError

try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

import onnx_ir as ir

from moeopt.lower.onnx.branch import one_or_many


def value(name, *shape, dtype=ir.DataType.FLOAT):
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def times(factor):
    """(x (B, S, 2), h (B, 2)) -> x times ``factor``, h plus ``factor``; names are the same for every factor."""
    x, h = value("x", "B", "S", 2), value("h", "B", 2)
    weight = value("weight", 1)
    weight.const_value = ir.tensor([float(factor)], name="weight")
    product, total = ir.node("Mul", [x, weight], name="go"), ir.node("Add", [h, weight], name="on")
    for node, like in ((product, x), (total, h)):
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{node.name}.0", like.type, like.shape
    graph = ir.Graph(
        [x, h],
        [product.outputs[0], total.outputs[0]],
        nodes=[product, total],
        initializers=[weight],
        opset_imports={"": 20},
        name="same",
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def model():
    """Two such choices, one after the other, in one graph."""
    x, h, mask = value("x", "B", "S", 2), value("h", "B", 2), value("mask", "B", "T", dtype=ir.DataType.INT64)
    nodes, values, weights = [], [x, h], []
    for name, factors in (("first", (2, 3)), ("second", (5, 7))):
        one, many = map(times, factors)
        made, values = one_or_many(one, many, name, mask, values)
        nodes += made
        for part in (one, many):
            assert not list(part.graph) and not part.graph.inputs and not part.graph.outputs
            weights += list(part.graph.initializers.values())
            part.graph.initializers.clear()
    graph = ir.Graph([x, h, mask], values, nodes=nodes, initializers=weights, opset_imports={"": 20}, name="both")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "past", "factor"),
    [(1, 1, 10), (1, 6, 10), (1, 0, 21), (2, 0, 21), (2, 1, 21), (7, 0, 21), (7, 6, 21)],
)
def test_one_runs_for_a_single_token_after_others_only(model, rows, tokens, past, factor):
    session = Session(ir.to_proto(model).SerializeToString())
    x, h = torch.rand(rows, tokens, 2) + 1, torch.rand(rows, 2)
    mask = torch.ones(rows, past + tokens, dtype=torch.int64)
    y, state = session.run({"x": x, "h": h, "mask": mask})
    torch.testing.assert_close(y, x * factor)
    torch.testing.assert_close(state, h + {10: 7, 21: 10}[factor])


def test_what_the_mask_holds_does_not_choose(model):
    session = Session(ir.to_proto(model).SerializeToString())
    x, h, mask = torch.ones(2, 1, 2), torch.zeros(2, 2), torch.zeros(2, 5, dtype=torch.int64)
    assert (session.run({"x": x, "h": h, "mask": mask})[0] == 10).all()


def test_no_two_parts_have_one_name(model):
    nodes = list(model.graph.all_nodes())
    names = [v.name for node in nodes for v in node.outputs] + list(model.graph.initializers)
    assert len(set(names)) == len(names)
    assert all(name.startswith(("first/", "second/")) for name in [*names, *(node.name for node in nodes)])
    assert {"first/one/weight", "first/many/weight", "second/one/weight", "second/many/weight"} < set(names)

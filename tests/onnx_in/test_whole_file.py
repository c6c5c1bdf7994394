"""``moeopt.from_onnx``: a file as a module that computes the same, and that inspect, profile and optimize take."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import moeopt
from moeopt.errors import UsageError
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.region_module import RegionEnds, region_module
from moeopt.onnx_in.regions import candidate_regions
from tests.onnx_in.hit_loops import hit_loop
from tests.onnx_in.long_graph import model
from tests.onnx_in.toys import E, export, ids, run, toy_lm


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export(toy_lm(), tmp_path_factory.mktemp("whole") / "home.onnx")


def test_it_computes_what_the_file_computes(path):
    model = moeopt.from_onnx(path)
    more = ids(3, 9, seed=4)
    want = run(path, input_ids=more)[0]
    assert torch.allclose(model(more), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=more), model(more)) and not model.training
    blocks = [name for name, module in model.named_modules() if name.endswith("mlp")]
    assert blocks == ["layers.0.mlp", "layers.1.mlp"]
    assert [n for n, _ in model.named_parameters() if ".mlp." in n] == [
        f"layers.{n}.mlp.{w}" for n in range(2) for w in ("gate_weight", "up", "down")
    ]
    assert not any(p.requires_grad for p in model.parameters())


def test_it_is_optimised_as_any_module(path):
    found = moeopt.optimize(moeopt.from_onnx(path), {"input_ids": ids()}, verify="fast")
    assert [b.name for b in found.report.rewritten] == ["layers.0.mlp", "layers.1.mlp"] and found.certificate.passed


def test_inspect_and_profile_take_a_file(path, monkeypatch):
    assert [kind.experts for kind in moeopt.inspect(path).kinds] == [E]
    found = moeopt.profile(path, measure=False)
    assert [layer.name for layer in found.layers] == ["layers.0.mlp", "layers.1.mlp"]


def test_an_operator_that_is_read_wrongly_is_caught(path, monkeypatch):
    from moeopt.onnx_in.operators.table import OPERATORS

    monkeypatch.setitem(OPERATORS, ("", "Sigmoid"), lambda call: torch.sigmoid(1.01 * call.tensor(0)))
    with pytest.raises(
        UsageError, match=r"home\.onnx has no form as a module: ONNX Runtime's result is .* from what moeopt"
    ):
        moeopt.from_onnx(path)
    found = moeopt.optimize(path, verify="fast")
    assert [b.status for b in found.report.blocks] == ["declined", "declined"]
    assert "from what moeopt reads its nodes as, and rounding explains" in found.report.blocks[0].reason


def test_the_wrong_inputs_are_told(path):
    with pytest.raises(UsageError, match="the graph takes input_ids; it was given 2 by position"):
        moeopt.from_onnx(path)(ids(), ids())


def test_an_operator_that_no_module_has_is_told_by_the_node(tmp_path):
    draw = numpy_helper.from_array(np.zeros((1, 4, 4), np.float32), "w")
    nodes = [helper.make_node("LSTM", ["x", "w", "w"], ["y"], name="/rnn/lstm", hidden_size=1)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [draw])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"m\.onnx has no form as a module: the node '/rnn/lstm' is LSTM"):
        moeopt.from_onnx(tmp_path / "m.onnx")


def test_an_unrolled_loop_runs_as_a_module(tmp_path):
    path = hit_loop("all", tmp_path / "all.onnx", 5)
    x = torch.randn(7, 16)
    assert torch.allclose(moeopt.from_onnx(path)(x), run(path, x=x)[0], rtol=1e-5, atol=1e-5)


class Unrolled(torch.nn.Module):
    """Every expert on every token, without biases: the exporter stores transposed weights under names of its own."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 4)
        self.up, self.down = (torch.nn.ModuleList(torch.nn.Linear(8, 8, False) for _ in range(4)) for _ in range(2))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        experts = enumerate(zip(self.up, self.down, strict=True))
        return sum(((ids == e) * weights).sum(-1, True) * down(up(x).relu()) for e, (up, down) in experts)


def test_inspect_tells_experts_whose_weights_have_no_place_of_their_own(tmp_path):
    torch.manual_seed(0)
    x, path = torch.randn(2, 5, 8), tmp_path / "unrolled.onnx"
    torch.onnx.export(
        Unrolled().eval(), (x,), path, dynamo=False, dynamic_axes={"x": {0: "b", 1: "t"}}, input_names=["x"]
    )
    found = moeopt.inspect(path)
    (note,) = [n for n in found.notes if "may be experts" in n]
    assert "4 chains of products" in note and "counted as dense" in note and not found.kinds


def test_a_bound_that_is_left_out_is_one_for_the_module_and_none_for_a_block_that_is_lowered_again():
    proto = model(1)
    for node in proto.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.append("one")
    (candidate,) = candidate_regions(GraphIndex(read_onnx(proto).model.graph))
    region = candidate.regions[0]
    ends = RegionEnds((region.entries[0].name,), {})
    for to_lower, high in ((False, torch.finfo(torch.float32).max), (True, None)):
        made = region_module(region, ends, 17, "x", to_lower=to_lower)
        tape = torch.fx.experimental.proxy_tensor.make_fx(made)(torch.randn(3, 2))
        bounds = [(*n.args[1:], None)[:2] for n in tape.graph.nodes if "clamp" in str(n.target)]
        assert bounds == [(1.0, high)] * 4


def test_a_node_that_does_not_take_what_it_is_given_is_named(tmp_path):
    """torch's own words named neither the node nor what it was given."""
    weight = numpy_helper.from_array(np.ones((5, 7), np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 5), ("y", 7))]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="a/b")], "g", ends[:1], ends[1:], [weight]
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    said = (
        r"the node 'a/b' \(MatMul\) fails on x \[2, 6\] float32, w \[5, 7\] float32: mat1 and mat2 shapes cannot be "
        r"multiplied .*; give inputs of the sizes and types that the file was made for; where ONNX Runtime refuses them"
    )
    with pytest.raises(RuntimeError, match=said):
        moeopt.from_onnx(path)(torch.ones(2, 6))
    with pytest.raises(UsageError, match=r"m\.onnx does not run on the inputs that were given: " + said):
        moeopt.from_onnx(path, inputs={"x": torch.ones(2, 6)})

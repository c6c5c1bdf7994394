"""Blocks that are one operator already, or stand in a body, are listed with the reason and the node's name."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import moeopt

E, H, I = 4, 8, 16


def moe_file(path):
    """A com.microsoft.MoE behind a gate."""
    draw = np.random.default_rng(0)
    arrays = {
        "gate": draw.normal(size=(H, E)), "w1": draw.normal(size=(E, I, H)), "w2": draw.normal(size=(E, H, I)),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["logits"], name="gate_mm"),
        helper.make_node(
            "MoE", ["x", "logits", "w1", "", "w2"], ["y"], name="/layer/moe", domain="com.microsoft", k=2,
            activation_type="relu", normalize_routing_weights=1,
        ),
    ]  # fmt: skip
    return saved(path, nodes, arrays, [helper.make_opsetid("com.microsoft", 1)])


def loop_file(path):
    """Two dense experts, summed, in the body of an If."""
    draw = np.random.default_rng(0)
    arrays = {f"{w}{e}": draw.normal(size=s) for e in range(2) for w, s in (("up", (H, I)), ("down", (I, H)))}
    body = []
    for e in range(2):
        body += [
            helper.make_node("MatMul", ["x", f"up{e}"], [f"h{e}"], name=f"up{e}"),
            helper.make_node("Relu", [f"h{e}"], [f"a{e}"], name=f"act{e}"),
            helper.make_node("MatMul", [f"a{e}", f"down{e}"], [f"o{e}"], name=f"down{e}"),
        ]
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    then = helper.make_graph([*body, helper.make_node("Add", ["o0", "o1"], ["z"], name="sum")], "then", [], [out])
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z2"])], "else", [], [helper.make_tensor_value_info("z2", 1, None)]
    )
    flag = numpy_helper.from_array(np.array(True), "flag")
    branch = helper.make_node("If", ["flag"], ["y"], name="choose", then_branch=then, else_branch=other)
    return saved(path, [branch], arrays, [], [flag])


def saved(path, nodes, arrays, opsets, more=()):
    weights = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", H]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [*weights, *more])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), *opsets], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("make", "name", "experts", "said"),
    [
        (moe_file, "layer.moe", E, "the node '/layer/moe' is com.microsoft.MoE: one operator for all experts"),
        (
            loop_file,
            "choose.region_0",
            2,
            "it stands in a body of the node 'choose' (If), and moeopt replaces blocks of the main",
        ),
    ],
)
def test_it_is_listed_with_the_reason(make, name, experts, said, tmp_path):
    found = moeopt.optimize(make(tmp_path / "m.onnx"))
    (block,) = found.report.blocks
    assert (block.name, block.status, block.experts) == (name, "declined", experts)
    assert said in block.reason
    assert any("is left as it is" in note for note in found.report.notes)
    bundle = found.save(tmp_path / "out")
    assert moeopt.verify(bundle).passed

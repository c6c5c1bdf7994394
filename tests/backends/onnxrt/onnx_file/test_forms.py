"""Files of other opsets, of one size, with convolutions, with quantised weights: rewritten, or declined by the node."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import moeopt
from tests.onnx_in.long_graph import layers
from tests.onnx_in.toys import E, export, ids, run, toy_lm


def blocks_of(path, **fields):
    found = moeopt.optimize(path, verify="fast", **fields)
    return found, [(b.status, b.experts) for b in found.report.blocks]


@pytest.mark.parametrize("opset", [13, pytest.param(15, marks=pytest.mark.nightly)])
def test_a_file_of_an_old_opset_keeps_it_or_is_raised_as_far_as_its_own_nodes_stay_the_same(opset, tmp_path):
    path = export(toy_lm("bmm", 1), tmp_path / "old.onnx", "torchscript", opset=opset)
    found, blocks = blocks_of(path)
    assert blocks == [("rewritten", E)]
    more = ids(3, 4, seed=3)
    assert torch.allclose(found(more), run(path, input_ids=more)[0], rtol=1e-5, atol=1e-5)
    made = onnx.load(found.save(tmp_path / "out") / "model.onnx", load_external_data=False)
    assert opset <= next(o.version for o in made.opset_import if not o.domain) < 20
    before = onnx.load(path, load_external_data=False)
    kept = {n.SerializeToString() for n in made.graph.node}
    assert all(
        n.SerializeToString() in kept for n in before.graph.node if "mlp" not in n.name and n.op_type != "Constant"
    )


def test_a_file_of_one_size_is_read_with_its_sizes_free(tmp_path):
    torch.onnx.export(
        toy_lm("bmm", 1), (ids(),), tmp_path / "one.onnx", dynamo=True, verbose=False, input_names=["input_ids"]
    )
    found, blocks = blocks_of(tmp_path / "one.onnx")
    assert blocks == [("rewritten", E)]
    other = ids(seed=9)
    assert torch.allclose(found(other), run(tmp_path / "one.onnx", input_ids=other)[0], rtol=1e-5, atol=1e-5)


class ConvExperts(nn.Module):
    """(B, C, h, w) pixels, each to 2 of 4 pointwise convolutions, all run on every pixel."""

    def __init__(self):
        super().__init__()
        self.router = nn.Conv2d(8, 4, 1)
        self.parts = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(8, 16, 1), nn.SiLU(), nn.Conv2d(16, 8, 1)) for _ in range(4)]
        )

    def forward(self, x):
        probs = torch.softmax(self.router(x), 1)
        weights, chosen = probs.topk(2, 1)
        table = torch.zeros_like(probs).scatter(1, chosen, weights / weights.sum(1, keepdim=True))
        return sum(table[:, e : e + 1] * part(x) for e, part in enumerate(self.parts))


def test_pointwise_convolutions_of_a_detector_are_experts_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), ConvExperts(), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    free = {"images": {0: "batch", 2: "h", 3: "w"}}
    torch.onnx.export(
        model, (torch.randn(2, 3, 6, 5),), tmp_path / "yolo.onnx", dynamo=False, input_names=["images"],
        dynamic_axes=free, opset_version=17,
    )  # fmt: skip
    found, blocks = blocks_of(tmp_path / "yolo.onnx")
    assert blocks == [("rewritten", 4)]
    x = torch.randn(1, 3, 8, 7)
    assert torch.allclose(found(x), run(tmp_path / "yolo.onnx", images=x)[0], rtol=1e-5, atol=1e-5)


def quantised(path):
    """One layer of dense experts whose weights are int8 behind DequantizeLinear."""
    nodes, weights, last = layers(1)
    made, draw = [], np.random.default_rng(0)
    for node in nodes:
        for number, name in enumerate(node.input):
            if name.endswith((".up", ".down")):
                made.append(
                    helper.make_node("DequantizeLinear", [f"{name}.q", "scale"], [f"{name}.f"], name=f"{name}.dq")
                )
                node.input[number] = f"{name}.f"
        made.append(node)
    held = [numpy_helper.from_array(np.array(0.125, np.float32), "scale")]
    for tensor in weights:
        whole = tensor.name.endswith((".up", ".down"))
        values = draw.integers(-9, 9, tensor.dims).astype(np.int8)
        held.append(numpy_helper.from_array(values, f"{tensor.name}.q") if whole else tensor)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", 2]) for n in ("x", last)]
    graph = helper.make_graph(made, "g", ends[:1], ends[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_experts_of_codes_keep_them(tmp_path):
    quantised(tmp_path / "int8.onnx")
    found, blocks = blocks_of(tmp_path / "int8.onnx")
    assert blocks == [("rewritten", 4)]
    assert any("have the codes of the file" in note for note in found.report.notes)

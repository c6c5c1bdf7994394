"""Inputs that are made up for a file's graph."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import moeopt
from moeopt.onnx_in.ends import graph_inputs, tensor_type
from moeopt.onnx_in.feeds import made_up_feeds, resized
from moeopt.onnx_in.read import read_onnx
from tests.onnx_in.toys import run


def file(*dims):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [y])
    return read_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", onnx.defs.onnx_opset_version())]))


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (("batch", "s", 8), (2, 5, 8)),
        (("batch", "2", "s", "8"), (2, 2, 5, 8)),  # as transformers' exporter calls the fixed sizes of a cache
        ((None, "past_s"), (2, 3)),
        (("²", "9999999999"), (2, 5)),  # names like others
    ],
)
def test_sizes_follow_the_names_of_dimensions_and_a_number_is_itself(dims, shape):
    made = next(iter(made_up_feeds(file(*dims), 0)))
    assert tuple(made["x"].shape) == shape


def test_a_size_that_is_called_by_its_number_is_not_changed():
    one = file("batch", "2")
    feeds = next(iter(made_up_feeds(one, 0)))
    dims = {v.name: tensor_type(one, v)[1] for v in graph_inputs(one.proto.graph)}
    assert tuple(resized(feeds, dims)["x"].shape) == (3, 2)


class ExpertsOfSamples(torch.nn.Module):
    """(N, T, H) samples, each with the two experts of its own condition (N, H)."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 6)
        made = [torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 8)) for _ in range(6)]
        self.experts = torch.nn.ModuleList(made)

    def forward(self, x, condition):
        weights, ids = self.gate(condition).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            y = y.index_add(0, row, expert(x[row]) * weights[row, slot, None, None])
        return y


def test_more_samples_are_made_up_where_two_choose_too_few_experts(tmp_path):
    torch.manual_seed(0)
    path, call = str(tmp_path / "samples.onnx"), (torch.randn(3, 5, 8), torch.randn(3, 8))
    torch.onnx.export(
        ExpertsOfSamples().eval(), call, path, dynamo=False, input_names=["x", "c"], opset_version=17,
        dynamic_axes={"x": {0: "n", 1: "t"}, "c": {0: "n"}},
    )  # fmt: skip
    found = moeopt.optimize(path, verify="off")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", 6)]
    assert torch.allclose(found(*call), run(path, x=call[0], c=call[1])[0], rtol=1e-5, atol=1e-5)

"""Inputs that are made up for a file's graph."""

import onnx
import pytest
from onnx import TensorProto, helper

from moeopt.onnx_in.ends import graph_inputs, tensor_type
from moeopt.onnx_in.feeds import made_up_feeds, resized
from moeopt.onnx_in.read import read_onnx


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

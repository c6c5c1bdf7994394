"""A vector added to a Gemm is its third input; other sums stay."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from moeopt.lower.onnx.lowerings.gemm_bias import join_biases
from tests.backends.onnxrt.onnx_file.test_by_hand import run

WEIGHT = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def joined(bias, turned=False, read_twice=False, third=None, op="Gemm"):
    """The ops of ``x W + bias`` once biases are joined, and how far the result is from that before."""
    reads = ["x", "weight", *([] if third is None else ["third"])]
    given = {"transB": 1, "alpha": 0.5} if op == "Gemm" else {}
    held = {"weight": WEIGHT if op == "Gemm" else WEIGHT.T.copy(), "bias": np.float32(bias), "third": third}
    nodes = [
        helper.make_node(op, reads, ["product"], **given),
        helper.make_node("Add", ["bias", "product"] if turned else ["product", "bias"], ["sum"]),
        helper.make_node("Mul", ["sum", "product" if read_twice else "sum"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in held.items() if v is not None]
    ends = [[helper.make_tensor_value_info("x", 1, ["t", 4])], [helper.make_tensor_value_info("y", 1, ["t", 5])]]
    graph = helper.make_graph(nodes, "g", *ends, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    model = ir.from_proto(proto)
    for node in model.graph:
        if node.op_type in ("Gemm", "MatMul"):
            node.outputs[0].shape = ir.Shape(["t", 5])
    join_biases(model)
    made = ir.to_proto(model)
    torch.testing.assert_close(run(made, x=X), run(proto, x=X))
    return [node.op_type for node in made.graph.node]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_a_vector_is_joined(shape, turned):
    assert joined(np.arange(5.0).reshape(shape), turned) == ["Gemm", "Mul"]


@pytest.mark.parametrize(
    ("bias", "given"),
    [
        (np.ones((3, 5)), {}),
        (np.ones(1), {}),
        (np.ones((1, 1, 5)), {}),
        (np.ones(5), {"read_twice": True}),
        (np.ones(5), {"third": np.ones(5, "float32")}),
    ],
    ids=["a row each", "one number", "another rank", "read twice", "has one"],
)
def test_another_sum_stays(bias, given):
    assert joined(bias, **given) == ["Gemm", "Add", "Mul"]


def test_onnx_runtime_joins_those_of_matmul_itself():
    assert joined(np.ones(5), op="MatMul") == ["MatMul", "Add", "Mul"]

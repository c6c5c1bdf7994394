"""Each operator of the interpreter beside ONNX Runtime, on values where a careless reading of the standard differs."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import moeopt
from moeopt.errors import UsageError

X = np.random.default_rng(0).standard_normal((3, 4, 6)).astype("float32")
WHOLE = np.random.default_rng(1).integers(-5, 5, (3, 4, 6))
HALF = (300 * X).astype("float16")  # squares of it are beyond float16
STEEP = X * np.float32([1, 1, 1e6, 1, 1, 1])
INFINITE = np.where(X > 1.5, np.float32(np.inf), X)
ROW = X[0, 0]


def one_node(op, inputs, constants=(), outputs=1, **attributes):
    """A model of one node that reads its inputs, then its constants."""
    names = [f"x{i}" for i in range(len(inputs))]
    held = [numpy_helper.from_array(np.asarray(c), f"c{i}") for i, c in enumerate(constants)]
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, [*names, *(t.name for t in held)], made, name=f"the_{op}", **attributes)
    ends = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
        for n, x in zip(names, inputs, strict=True)
    ]
    graph = helper.make_graph([node], "one", ends, [helper.make_empty_tensor_value_info(n) for n in made], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def both(model: onnx.ModelProto, inputs):
    """What ONNX Runtime gives, and what the module gives."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    want = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})
    got = moeopt.from_onnx(model, tuple(inputs))(*(torch.from_numpy(x.copy()) for x in inputs))
    return [torch.from_numpy(w) for w in want], list(got) if isinstance(got, tuple) else [got]


@pytest.mark.parametrize(
    ("op", "inputs", "constants", "attributes"),
    [
        ("Selu", [X], [], {"alpha": 2.0, "gamma": 0.5}),
        ("Selu", [X], [], {}),
        ("CumSum", [STEEP], [2], {"exclusive": 1}),
        ("CumSum", [INFINITE], [2], {"exclusive": 1}),
        ("CumSum", [X], [1], {"reverse": 1}),
        ("CumSum", [WHOLE], [-1], {"exclusive": 1, "reverse": 1}),
        ("ReduceMean", [WHOLE], [[-1]], {}),
        ("ReduceMean", [X], [[0, 2]], {"keepdims": 0}),
        ("ReduceL2", [HALF], [[-1]], {}),
        ("ReduceSumSquare", [X], [[-1]], {}),
        ("SimplifiedLayerNormalization", [HALF], [ROW.astype("float16")], {}),
        ("LayerNormalization", [X], [ROW, ROW], {"axis": 1}),
        ("LayerNormalization", [X], [ROW, ROW], {"axis": -1}),
        ("BatchNormalization", [X], [*X[0, :, :3].T, X[0, :, 0] ** 2], {"epsilon": 1e-3}),
        ("BatchNormalization", [X[0]], [*X[1, :3], X[0, 0] ** 2], {}),
        ("InstanceNormalization", [X], [X[0, :, 0], X[0, :, 1]], {"epsilon": 1e-3}),
        ("GroupNormalization", [X], [X[0, :, 0], X[0, :, 1]], {"num_groups": 2}),
        ("PRelu", [X], [np.float32([0.3])], {}),
        ("Flatten", [X], [], {"axis": -1}),
        ("Flatten", [X], [], {"axis": -3}),
        ("Flatten", [X], [], {"axis": 3}),
        ("Gather", [X, np.array(-1)], [], {"axis": 2}),
        ("EyeLike", [X[0]], [], {"dtype": onnx.TensorProto.INT64}),
        ("Gemm", [X[0], X[1]], [np.full((6, 6), np.nan, "float32")], {"transA": 1, "beta": 0.0}),
        ("Slice", [X], [[3], [1], [2], [1]], {}),
        ("Slice", [X], [[4], [1], [2], [-1]], {}),
    ],
)
def test_it_gives_what_onnx_runtime_gives(op, inputs, constants, attributes):
    for want, got in zip(*both(one_node(op, inputs, constants, **attributes), inputs), strict=True):
        near = 1e-2 if want.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(got, want, rtol=near, atol=near)


@pytest.mark.parametrize("x", [np.zeros((3, 40), "float32"), np.round(X), WHOLE], ids=["zeros", "rounded", "whole"])
@pytest.mark.parametrize("attributes", [{}, {"largest": 0}, {"axis": 0}])
def test_top_k_of_equal_scores_takes_the_first(x, attributes):
    for want, got in zip(*both(one_node("TopK", [x], [[2]], outputs=2, **attributes), [x]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("op", "constants", "attributes", "said"),
    [
        ("ArgMax", [], {"select_last_index": 1}, "the node 'the_ArgMax' .* takes the last of equal values"),
        ("EyeLike", [], {"k": 1}, "the node 'the_EyeLike' .* makes another diagonal than the main one"),
        (
            "BatchNormalization",
            [X[0, :, 0]] * 4,
            {"training_mode": 1},
            "the node 'the_BatchNormalization' .* is in training mode, in which its rows depend on one another",
        ),
        ("Pad", [[0, 1, 0, 0, 0, 2]], {"mode": "reflect"}, "the node 'the_Pad' .* pads otherwise than with a constant"),
    ],
)
def test_an_attribute_that_no_module_has_is_told_before_the_module_is_given_out(op, constants, attributes, said):
    model = one_node(op, [X], constants, **attributes)
    for inputs in (None, X):
        with pytest.raises(UsageError, match=f"has no form as a module: {said}"):
            moeopt.from_onnx(model, inputs)

"""What is said where ONNX Runtime refuses a graph that was written for it."""

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt import session as sessions
from moeopt.backends.onnxrt.missing_kernels import missing_kernel
from moeopt.errors import NotSaveableError
from tests.backends.onnxrt.toys import H, Mixture

pytestmark = pytest.mark.one_isa  # what is said of a graph

pytest.importorskip("onnxruntime")


def test_a_graph_that_does_not_load_is_told_in_one_sentence(monkeypatch):
    import onnxruntime

    def refuse(*args, **kwargs):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Node (squeeze_2) is not right\nand more")

    monkeypatch.setattr(sessions.runtime(), "InferenceSession", refuse)
    with pytest.raises(NotSaveableError) as caught:
        moeopt.optimize(Mixture().eval(), torch.randn(3, H), backend="onnxruntime", verify="off")
    assert str(caught.value) == (
        f"ONNX Runtime {onnxruntime.__version__} does not load the graph that was written for cpu: "
        "[ONNXRuntimeError] : 1 : FAIL : Node (squeeze_2) is not right; use backend='torch', or report this with the "
        "model's code"
    )


class Wide(torch.nn.Module):
    def forward(self, x):
        return torch.erf(x.double()).float()


class WideGelu(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x.double()).float()


@pytest.mark.parametrize("model", [Wide(), WideGelu()], ids=lambda model: type(model).__name__)
def test_an_op_of_float64_without_a_kernel_is_named_with_the_line_and_the_way_out(model):
    with pytest.raises(NotSaveableError) as caught:
        moeopt.optimize(model, torch.randn(3, H), backend="onnxruntime", verify="off")
    text = str(caught.value)
    assert "on cpu has no kernel for Erf of float64 (File " in text and "test_open_engine.py" in text
    assert "export a float32 copy of the model, compute that line in float32, or use backend='torch'" in text


def test_a_kernel_that_lacks_for_another_dtype():
    error = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Det(11) node with name 'n'"
    assert missing_kernel(error, {"Erf": ""}, "ONNX Runtime 1 on cpu") == (
        "ONNX Runtime 1 on cpu has no kernel for Det: write that function with other ops, or use backend='torch'"
    )
    assert missing_kernel("something else", {}, "ONNX Runtime 1 on cpu") == ""

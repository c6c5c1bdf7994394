"""What is said where ONNX Runtime refuses a graph that was written for it."""

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt import session as sessions
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

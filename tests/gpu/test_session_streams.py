"""One graph on ONNX Runtime's CUDA provider: order with the caller's streams, and replays of a CUDA graph."""

import pytest
import torch

pytest.importorskip("onnxruntime")

from moeopt.backends.onnxrt.cuda_graph import CUDA_GRAPH
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Session
from tests.gpu.marks import ON_CUDA_PROVIDER

pytestmark = ON_CUDA_PROVIDER
H = 256


def graph():
    """y = x w[ids]: the rows of w that ids name, as one ``MatMul`` after a ``Gather``; and w."""
    from onnx import TensorProto, helper, numpy_helper

    w = torch.randn(H, H, generator=torch.Generator().manual_seed(0)) / 16
    nodes = [helper.make_node("Gather", ["w", "ids"], ["rows"]), helper.make_node("MatMul", ["x", "rows"], ["y"])]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", H]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [H]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", H])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(w.numpy(), "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString(), w.cuda()


def slow(value):
    """``value`` on the GPU, after so much work that a run that does not wait would read something else."""
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 64
    return value.cuda() + 0 * busy[0, 0].nan_to_num(0, 0, 0)


@pytest.mark.parametrize("captured", (False, True))
@pytest.mark.parametrize("aside", (False, True))
def test_a_run_comes_after_what_the_caller_queued_and_before_what_comes_next(aside, captured):
    source, w = graph()
    options = None
    if captured:
        options = runtime().SessionOptions()
        options.add_session_config_entry(CUDA_GRAPH, "1")
    session = Session(source, "cuda", options)
    ids = torch.arange(H).flip(0)
    stream = torch.cuda.Stream() if aside else torch.cuda.current_stream()
    kept = []
    with torch.cuda.stream(stream):
        for seed in range(5):
            x = torch.randn(8, H, generator=torch.Generator().manual_seed(seed))
            (y,) = session.run({"x": slow(x), "ids": ids.cuda()})
            kept.append((y, x))
        torch.cuda.synchronize()
        for y, x in kept:
            want = x.cuda().double() @ w.double().flip(0)
            assert (y - want).norm() <= 1e-5 * want.norm()  # float32 sums of 256 terms

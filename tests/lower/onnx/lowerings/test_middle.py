"""Each activation as nodes against the same one in PyTorch, far into its tails, in each dtype."""

import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from moeopt.ir.specs import ACTIVATIONS
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.lowerings.middle import activation
from moeopt.ops.activations import activate
from tests.backends.onnxrt.lowerings.one_site import session_of

TAILS = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0, 100.0, -100.0, 2e4, -2e4])
# eps of |x| (at least 1): erf and tanh are polynomials in ONNX Runtime, good to a few eps; 4 measured
BUDGET = 8


def by_ort(g, name, alpha):
    x = ir.Value(name="x", type=ir.TensorType(from_torch_dtype(g.dtype)), shape=ir.Shape(["N"]))
    builder = Builder("act")
    y = builder.op("Identity", [activation(builder, x, name, alpha, g.dtype)])
    y.type, y.shape = x.type, x.shape
    graph = ir.Graph([x], [y], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": 18}, name="g")
    return torch.from_numpy(session_of(ir.Model(graph, ir_version=10)).run(None, {"x": g.numpy()})[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_agrees_with_torch(name, dtype):
    if name == "gelu" and dtype == torch.float64:
        pytest.skip("no float64 Erf: types.refuses_types says so")
    g = torch.cat([torch.linspace(-9, 9, 201), TAILS if name != "relu2" else TAILS[:6]]).to(dtype)
    got, want = by_ort(g, name, 0.7), activate(g.double(), name, 0.7)
    # relu2 and its like are judged against their own size
    size = torch.maximum(g.double().abs(), want.abs()).clamp_min(1)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() / size).max() <= BUDGET * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name):
    got = by_ort(torch.tensor([1.0, float("nan"), -1.0]), name, 0.7)
    assert got.isnan().tolist() == [False, True, False]

"""Numbers beside float64 tensors keep all their digits in a graph, be they attributes, scales or fills."""

import pytest
import torch
import torch.nn.functional as F

from moeopt.backends.onnxrt.providers import runtime
from moeopt.errors import UsageError
from moeopt.lower.export import export_program
from moeopt.lower.onnx.export import to_onnx
from moeopt.lower.onnx.float64 import attributes_written_out
from moeopt.lower.signature import functional
from tests.capture.tiny import rand

try:
    ort = runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

import onnx_ir as ir

FUNCTIONS = {
    "layer_norm": lambda x: F.layer_norm(x, (8,), x.new_full((8,), 0.3), x.new_full((8,), 0.1), eps=1e-5),
    "layer_norm of two axes": lambda x: F.layer_norm(x, (6, 8), eps=1e-5),
    "rms_norm": lambda x: F.rms_norm(x, (8,), eps=1e-5),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 0.7),
    "selu": F.selu,
    "hardtanh": lambda x: F.hardtanh(x, -0.003, 0.007),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": lambda x: F.softplus(x, 1.3),
    "mish": F.mish,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "scale": lambda x: x * 0.7,
    "rsub": lambda x: 0.7 - x,
    "full": lambda x: x + torch.full((8,), 0.7, dtype=x.dtype),
    "full_like": lambda x: x + torch.full_like(x, 0.7),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.7),
    "where": lambda x: torch.where(x > 0.003, x, 0.7),
    "clamp": lambda x: x.clamp(0.003, 0.7),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.7),
    "add alpha": lambda x: torch.add(x, x, alpha=0.7),
    "sub alpha": lambda x: torch.sub(x, x, alpha=0.7),
    "addmm": lambda x: torch.addmm(x.t() @ x, x.t(), x, beta=0.7, alpha=0.3),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None, :, :1], x[None, :1], beta=0.7, alpha=0.3),
    "arange": lambda x: x * torch.arange(0, 0.8, 0.1, dtype=x.dtype),
    "pow": lambda x: x.abs() ** 0.7,
    "norm": lambda x: torch.linalg.vector_norm(x, 0.7, dim=-1),
}


class Fn(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_keeps_its_digits(name):
    x = rand(6, 8, seed=3).double() * 0.01
    program = functional(export_program(Fn(FUNCTIONS[name]), (x,), {}))
    session = ort.InferenceSession(
        ir.to_proto(to_onnx(program)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = FUNCTIONS[name](x)
    # some thirty operations in another order; a number in float32 is off by up to 2**-24
    assert (torch.from_numpy(got) - want).abs().max() <= 64 * torch.finfo(x.dtype).eps * want.abs().max()


def test_float32_programs_stay_as_they_are():
    program = functional(export_program(Fn(FUNCTIONS["layer_norm"]), (rand(6, 8),), {}))
    assert attributes_written_out(program) is program

"""Complex tensors that get a size of one on their way, as in Llama 4's rotary embedding, reach ONNX."""

import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx_ir as ir

from moeopt.lower.onnx.complex import through_real_views
from moeopt.lower.onnx.export import to_onnx


class Rotary(torch.nn.Module):
    """Turns the pairs of x (B, S, N, D) by the angles (B, S, D/2)."""

    dim = 2

    def forward(self, x, angles):
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(self.dim)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3)


class FromTheEnd(Rotary):
    dim = -2


@pytest.mark.parametrize("cls", [Rotary, FromTheEnd])
def test_a_rotary_embedding(cls):
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(2, 3, 4, 6, generator=generator), torch.randn(2, 3, 3, generator=generator)
    program = torch.export.export(cls(), (x, angles)).run_decompositions({})
    before = str(program.graph)
    model = to_onnx(program)
    assert str(program.graph) == before, "the program that was given stays as it was"
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(
        None, dict(zip([e.name for e in session.get_inputs()], (x.numpy(), angles.numpy()), strict=True))
    )
    torch.testing.assert_close(torch.from_numpy(got), cls()(x, angles), rtol=1e-5, atol=1e-6)  # cos and sin round apart


def test_a_program_without_them_is_left_alone():
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.ones(2, 3),))
    assert through_real_views(program) is program

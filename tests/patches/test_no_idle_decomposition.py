"""The trace before ONNX is left out only where nothing would come of it."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")

from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from moeopt.lower.onnx.export import to_onnx
from moeopt.lower.signature import functional
from moeopt.patches import no_idle_decomposition
from tests.helpers import counted_decompositions


class Plain(nn.Module):
    """Named ``input``, which is a name of Python's too, and a view that torch's own trace turns otherwise."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, input):
        rows = self.norm(self.inner(input.reshape(-1, 6))).softmax(-1)
        return rows.view(input.shape[0], -1, 8), rows.sum()


class Both(nn.Module):
    def forward(self, x):
        return ((x > -1) & (x < 1)).float()


class Written(nn.Module):
    def forward(self, x):
        return x.clone().add_(1).relu_()


def exported(model, *args):
    free = tuple({d: torch.export.Dim.AUTO for d in range(a.dim())} for a in args)
    return torch.export.export(model.eval(), args, dynamic_shapes=free, strict=False)


@pytest.fixture
def traced(monkeypatch):
    """How often a program was traced once more."""
    return counted_decompositions(monkeypatch)


def ran(model, *args):
    """What ONNX Runtime computes with an ``onnx_ir.Model``, and the model's ops with their attributes."""
    import onnx_ir as ir
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    results = session.run(None, dict(zip(names, [a.numpy() for a in args], strict=True)))
    return [torch.from_numpy(r) for r in results], [(n.op_type, str(n.attributes)) for n in model.graph]


def test_a_functional_program_of_translated_ops_is_not_traced_again_and_is_the_same_graph(traced, monkeypatch):
    model, x = Plain(), torch.randn(3, 4, 6)
    program = functional(exported(model, x))
    before = program.graph_module.code
    traced.clear()
    quick = to_onnx(program)
    assert traced == [] and program.graph_module.code == before
    monkeypatch.setattr("moeopt.patches.onnx_export._translated", lambda *given: False)
    full = to_onnx(program)
    assert len(traced) == 1
    for args in ((x,), (torch.randn(5, 2, 6),)):
        (mine, ops), (theirs, their_ops) = ran(quick, *args), ran(full, *args)
        assert ops == their_ops and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        torch.testing.assert_close(mine, list(model(*args)))


def test_an_op_without_a_translation_is_decomposed(traced):
    program = functional(exported(Both(), torch.randn(3, 4)))
    traced.clear()
    untranslated = torch.ops.aten.__and__.Tensor
    assert untranslated in {n.target for n in program.graph.nodes}
    with no_idle_decomposition():
        made = _fx_passes.decompose_with_registry(program, ONNXRegistry.from_torchlib(opset_version=20))
    assert len(traced) == 1 and untranslated not in {n.target for n in made.graph.nodes}


def test_a_program_that_writes_to_its_values_is_traced_again(traced):
    program = exported(Written(), torch.randn(3, 4))
    with no_idle_decomposition():
        made = _fx_passes.decompose_with_registry(program, ONNXRegistry.from_torchlib(opset_version=20))
    assert len(traced) == 1 and not any(
        n.target._schema.is_mutable for n in made.graph.nodes if n.op == "call_function"
    )


def test_torchs_own_is_back_afterwards():
    before = _fx_passes.decompose_with_registry
    with pytest.raises(RuntimeError), no_idle_decomposition():
        assert _fx_passes.decompose_with_registry is not before
        raise RuntimeError
    assert _fx_passes.decompose_with_registry is before

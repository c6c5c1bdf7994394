"""bfloat16 and float16 experts inside a float32 model, as an engine: the cast's own rounding is the budget."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.lower.onnx.upcast import BEYOND_FLOAT16


class Block(nn.Module):
    def __init__(self, dtype, d=32, h=64, count=6):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(d), nn.Linear(d, count, bias=False)
        experts = [nn.Sequential(nn.Linear(d, h), nn.SiLU(), nn.Linear(h, d)) for _ in range(count)]
        self.experts, self.dtype = nn.ModuleList(experts).to(dtype), dtype

    def forward(self, x):
        t = self.norm(x).reshape(-1, x.shape[-1])
        weights, pick = self.gate(t).softmax(-1).topk(2, -1)
        y = torch.zeros_like(t)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(pick == e)
            y.index_add_(0, row, expert(t[row].to(self.dtype)).float() * weights[row, slot, None])
        return x + y.view_as(x)


def as_float64(model):
    exact = model.double()
    for module in exact.modules():
        if isinstance(module, Block):
            module.dtype = torch.float64
            module.forward = exact_forward.__get__(module)
    return exact


def exact_forward(self, x):
    t = self.norm(x).reshape(-1, x.shape[-1])
    weights, pick = self.gate(t).softmax(-1).topk(2, -1)
    y = torch.zeros_like(t)
    for e, expert in enumerate(self.experts):
        row, slot = torch.where(pick == e)
        y.index_add_(0, row, expert(t[row]) * weights[row, slot, None])
    return x + y.view_as(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.one_isa)], ids=str)
def test_the_engine_is_no_further_from_float64_than_the_model(dtype):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), Block(dtype), Block(dtype), nn.Linear(32, 16)).eval()

    engine = moeopt.optimize(build(), torch.randn(2, 9, 16), backend="onnxruntime")
    assert engine.certificate.passed is True and len(engine.report.rewritten) == 2
    x = torch.randn(3, 21, 16)
    with torch.no_grad():
        exact = as_float64(build())(x.double())
        far = [(form(x).double() - exact).norm(dim=-1).median() for form in (engine, build())]
    assert 0 < far[0] <= 1.05 * far[1]
    notes = [note for note in engine.report.notes if "65504" in note]
    assert (
        notes
        == [BEYOND_FLOAT16] * (dtype == torch.float16)
        == [note for note in engine.certificate.notes if "65504" in note]
    )


@pytest.mark.one_isa  # float16 overflows on every CPU
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}], ids=["floats", "codes"])
def test_what_overflows_float16_stays_finite_and_that_is_told(options):
    """Experts that read float16 rows, whose products are beyond its range."""
    torch.manual_seed(0)
    model = Block(torch.float16).eval()
    for expert in model.experts:
        nn.init.constant_(expert[2].weight, 1e4)
    engine = moeopt.optimize(model, torch.randn(2, 9, 32), backend="onnxruntime", verify="off", **options)
    x = torch.randn(2, 9, 32) * 1e3
    with torch.no_grad():
        assert not model(x).isfinite().all() and engine(x).isfinite().all()
    assert BEYOND_FLOAT16 in engine.report.notes


class Rounds(nn.Module):
    """float16 where the code asks for it, and no weight of that: such a rounding stays, and overflows as it did."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(torch.float32), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.block(x)).half().float()


def test_a_rounding_that_stays_has_no_note():
    torch.manual_seed(0)
    model = Rounds().eval()
    engine = moeopt.optimize(model, torch.randn(2, 9, 32), backend="onnxruntime", verify="fast")
    x = torch.randn(2, 9, 32) * 1e7
    with torch.no_grad():
        assert torch.equal(model(x).isinf(), engine(x).isinf()) and model(x).isinf().any()
    assert BEYOND_FLOAT16 not in engine.report.notes

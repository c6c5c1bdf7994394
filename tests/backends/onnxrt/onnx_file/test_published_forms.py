"""Forms of published models as files: a router that sees a condition, adapters beside a frozen layer, two routers."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.read import read_onnx
from moeopt.onnx_in.regions import candidate_regions
from tests.backends.onnxrt.onnx_file.test_given_experts import exported
from tests.onnx_in.toys import run

H, I, E, K = 8, 12, 4, 2


def experts():
    return nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E))


class ByCondition(nn.Module):
    """A diffusion transformer's block: all tokens of a sample go where its condition says. (B, T, H), (B, 1, H)"""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), experts()

    def forward(self, x, condition):
        weights, ids = self.gate(condition[:, 0]).softmax(-1).topk(1, -1)
        table = x.new_zeros(x.shape[0], E).scatter(1, ids, weights)
        return x + sum(table[:, e, None, None] * expert(x) for e, expert in enumerate(self.experts))


class SamplesTaken(ByCondition):
    def forward(self, x, condition):
        weight, ids = self.gate(condition[:, 0]).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            (sample,) = torch.where(ids == e)
            y = y.index_add(0, sample, expert(x[sample]) * weight[sample, None, None])
        return x + y


class Adapters(nn.Module):
    """One pair of narrow matrices for each token, beside a frozen layer. (B, T, H), (B, T, H) -> (B, T, I)"""

    def __init__(self):
        super().__init__()
        self.frozen, self.gate = nn.Linear(H, I), nn.Linear(H, E)
        self.down = nn.ModuleList(nn.Linear(H, 3, bias=False) for _ in range(E))
        self.up = nn.ModuleList(nn.Linear(3, I, bias=False) for _ in range(E))

    def forward(self, x, images):
        rows = (x + images).reshape(-1, H)
        ids, y = self.gate(rows).argmax(-1), rows.new_zeros(rows.shape[0], I)
        for e, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            (row,) = torch.where(ids == e)
            y = y.index_add(0, row, up(down(rows[row])))
        return self.frozen(x + images) + y.view(x.shape[0], -1, I)


class TwoRouters(nn.Module):
    """Tokens of an image have a router of their own. (B, T, H), (B, T, H) -> (B, T, H)"""

    def __init__(self):
        super().__init__()
        self.text, self.image, self.experts = nn.Linear(H, E), nn.Linear(H, E), experts()

    def forward(self, x, images):
        rows, of_image = x.reshape(-1, H), images.reshape(-1, H)[:, :1] > 0
        text, image = self.text(rows).softmax(-1).topk(K, -1), self.image(rows).softmax(-1).topk(K, -1)
        weights, ids = (torch.where(of_image, one, other) for one, other in zip(image, text, strict=True))
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(ids == e)
            y = y.index_add(0, row, expert(rows[row]) * weights[row, slot, None])
        return y.view(x.shape)


def call(batch, tokens, form, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    beside = 1 if form in (ByCondition, SamplesTaken) else tokens
    return torch.randn(batch, tokens, H, generator=drawn), torch.randn(batch, beside, H, generator=drawn)


@pytest.mark.parametrize(
    ("form", "exporter"),
    [
        (ByCondition, "torchscript"),
        *(
            pytest.param(form, exporter, marks=pytest.mark.nightly)
            for form in (ByCondition, Adapters, TwoRouters)
            for exporter in ("torchscript", "dynamo")
            if (form, exporter) != (ByCondition, "torchscript")
        ),
    ],
)
def test_a_file_of_it_is_rewritten(form, exporter, tmp_path):
    torch.manual_seed(0)
    example = call(8, 5, form)
    path = exported(form().eval(), example, tmp_path / "home.onnx", exporter)
    fast = moeopt.optimize(path, {f"in{n}": x for n, x in enumerate(example)}, verify="fast")
    assert [(b.status, b.experts) for b in fast.report.blocks if b.kind == "moe"] == [("rewritten", E)], fast.report
    drawn, beside = call(4, 7, form, 1)
    odd = drawn.clone()
    odd[0, 0], odd[1, 1] = torch.nan, 1e20
    for x in (drawn, odd, drawn * 0, drawn[:1, :1].expand_as(drawn).contiguous(), drawn * 1e20):
        want = run(path, in0=x, in1=beside)[0]
        far = (fast(in0=x, in1=beside) - want).abs() / want.abs().nan_to_num(0).amax(-1, keepdim=True).clamp_min(1)
        assert bool((far.isnan() == want.isnan()).all()) and float(far.nan_to_num(0).max()) < 1e-4


def test_rows_are_the_first_entry_where_a_condition_is_found_before_them(tmp_path):
    path = exported(SamplesTaken().eval(), call(6, 5, SamplesTaken), tmp_path / "home.onnx", "torchscript")
    (found,) = candidate_regions(GraphIndex(read_onnx(path).model.graph))
    assert found.regions and {region.entries[0].name for region in found.regions} == {"in0"}
    assert found.chains.root.name == "in0"

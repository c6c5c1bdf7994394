"""Ways to write a block that exporters make other graphs of: masks that are written through, shared experts, ties."""

import onnx
import pytest
import torch
from torch import nn

import moeopt
from tests.onnx_in.toys import run

H, I, E, K = 16, 24, 6, 2


class Experts(nn.Module):
    """A router and its experts; each twin below dispatches in a way of its own. (B, S, H) -> (B, S, H)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(self.expert() for _ in range(E))

    def expert(self):
        return nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H))

    def forward(self, x):
        rows = x.reshape(-1, H)
        weights, ids = torch.softmax(self.gate(rows), -1).topk(K, -1)
        return self.dispatch(rows, weights / weights.sum(-1, keepdim=True), ids).reshape(x.shape)


class WrittenThroughMasks(Experts):
    def dispatch(self, rows, weights, ids):
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask, weight = (ids == e).any(-1), ((ids == e) * weights).sum(-1)
            y[mask] += expert(rows[mask]) * weight[mask].unsqueeze(-1)
        return y


class OneOfThem(Experts):
    def forward(self, x):
        rows = x.reshape(-1, H)
        weight, chosen = torch.softmax(self.gate(rows), -1).max(-1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = chosen == e
            y[mask] = expert(rows[mask]) * weight[mask].unsqueeze(-1)
        return y.reshape(x.shape)


class SlotsOfTheirOwn(Experts):
    def dispatch(self, rows, weights, ids):
        slots, flat = rows.repeat_interleave(K, 0), ids.reshape(-1)
        y = torch.empty_like(slots)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(slots[flat == e])
        return (y.view(-1, K, H) * weights.unsqueeze(-1)).sum(1)


class AllOnAll(Experts):
    def dispatch(self, rows, weights, ids):
        table = torch.zeros(rows.shape[0], E, dtype=weights.dtype).scatter(1, ids, weights)
        return sum(expert(rows) * table[:, e : e + 1] for e, expert in enumerate(self.experts))


class SharedBehindASigmoid(AllOnAll):
    """A ninth expert, as it were: of the same shape, and for every token."""

    def __init__(self):
        super().__init__()
        self.shared, self.shared_gate = self.expert(), nn.Linear(H, 1, bias=False)

    def dispatch(self, rows, weights, ids):
        return super().dispatch(rows, weights, ids) + torch.sigmoid(self.shared_gate(rows)) * self.shared(rows)


class CalledTwice(nn.Module):
    """One block at two places."""

    def __init__(self):
        super().__init__()
        self.moe, self.norm = AllOnAll(), nn.LayerNorm(H)

    def forward(self, x):
        x = x + self.moe(self.norm(x))
        return x + self.moe(self.norm(x))


def exported(model, path, exporter):
    x = torch.randn(2, 9, H, dtype=next(model.parameters()).dtype)
    if exporter == "dynamo":
        free = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(
            model, (x,), path, dynamo=True, verbose=False, input_names=["x"], dynamic_shapes=free, external_data=False
        )
    else:
        axes = {"x": {0: "b", 1: "t"}}
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17)
    return path


@pytest.mark.parametrize(
    ("form", "exporter", "blocks"),
    [
        (WrittenThroughMasks, "dynamo", [(E, K)]),
        (OneOfThem, "torchscript", [(E, 1)]),
        (SlotsOfTheirOwn, "dynamo", [(E, K)]),
        (SharedBehindASigmoid, "torchscript", [(E, K)]),
        (CalledTwice, "dynamo", [(E, K), (E, K)]),
    ],
)
def test_it_is_rewritten_whole(form, exporter, blocks, tmp_path):
    torch.manual_seed(0)
    path = exported(form().eval(), tmp_path / "home.onnx", exporter)
    found = moeopt.optimize(path, verify="fast")
    assert [(b.experts, b.top_k) for b in found.report.rewritten if b.kind == "moe"] == blocks
    assert [b.kind for b in found.report.blocks if b.status == "declined"] in ([], ["dense_ffn"])
    x = torch.randn(3, 5, H)
    assert torch.allclose(found(x), run(path, x=x)[0], rtol=1e-5, atol=1e-5)
    old, new = (onnx.load(p, load_external_data=False) for p in (path, found.save(tmp_path / "out") / "model.onnx"))
    assert [o for o in new.opset_import if not o.domain] == [o for o in old.opset_import if not o.domain]


def test_experts_on_all_tokens_are_rewritten_in_halves_too(tmp_path):
    torch.manual_seed(0)
    path = exported(AllOnAll().eval().half(), tmp_path / "half.onnx", "dynamo")
    found = moeopt.optimize(path, verify="fast")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", E)] and found.certificate.passed

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


class GroupsOfExperts(Experts):
    """A router that leaves out all experts of a group by a mask of zeros and ones, and adds a bias to choose by."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(E) * 0.1)

    def forward(self, x):
        rows = x.reshape(-1, H)
        scores = self.gate(rows).sigmoid()
        groups = (scores + self.bias).view(-1, 2, E // 2).topk(2, -1)[0].sum(-1)
        best = torch.zeros_like(groups).scatter(1, groups.topk(1, -1)[1], 1.0)
        there = best[..., None].expand(-1, 2, E // 2).reshape(-1, E)
        ids = (scores + self.bias).masked_fill(there == 0, 0.0).topk(K, -1)[1]
        weights = scores.gather(1, ids)
        table = torch.zeros_like(scores).scatter(1, ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5)
        return sum(expert(rows) * table[:, e : e + 1] for e, expert in enumerate(self.experts)).view_as(x)


class AdaptersOfABase(AllOnAll):
    """Experts without biases on top of a layer that is not one of them: the exporter's names of weights are numbers."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(H, H)

    def expert(self):
        return nn.Sequential(nn.Linear(H, 4, bias=False), nn.Linear(4, H, bias=False))

    def dispatch(self, rows, weights, ids):
        return self.base(rows) + super().dispatch(rows, weights, ids)


class NormsOfTheirOwn(AllOnAll):
    """No two experts' products read the same rows."""

    def expert(self):
        norm = nn.LayerNorm(H)
        nn.init.normal_(norm.weight, 1, 0.1)
        return nn.Sequential(norm, *super().expert())


class NormsWrittenOut(AllOnAll):
    class Rms(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    def expert(self):
        return nn.Sequential(self.Rms(), *super().expert())


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


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("form", "exporter", "blocks"),
    [
        (WrittenThroughMasks, "dynamo", [(E, K)]),
        (OneOfThem, "torchscript", [(E, 1)]),
        (SlotsOfTheirOwn, "dynamo", [(E, K)]),
        (SharedBehindASigmoid, "torchscript", [(E, K)]),
        (CalledTwice, "dynamo", [(E, K), (E, K)]),
        (GroupsOfExperts, "torchscript", [(E, K)]),
        (AdaptersOfABase, "torchscript", [(E, K)]),
        (AdaptersOfABase, "dynamo", [(E, K)]),
        (NormsOfTheirOwn, "torchscript", [(E, K)]),
        (NormsWrittenOut, "dynamo", [(E, K)]),
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


@pytest.mark.parametrize("ends", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_what_the_converter_to_float16_makes_is_rewritten_although_its_nodes_are_out_of_order(ends, tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    torch.manual_seed(0)
    plain = exported(AllOnAll().eval(), tmp_path / "plain.onnx", "torchscript")
    half = convert_float_to_float16(onnx.load(plain), keep_io_types=ends)
    made = {name for node in half.graph.node for name in node.output}
    seen, late = set(), []
    for node in half.graph.node:
        late += [name for name in node.input if name in made - seen]
        seen |= set(node.output)
    assert late, "the converter appends its casts"
    onnx.save(half, tmp_path / "half.onnx")
    found = moeopt.optimize(tmp_path / "half.onnx", verify="fast")
    assert [(b.status, b.experts, b.top_k) for b in found.report.blocks] == [("rewritten", E, K)]
    assert found.certificate.passed
    x = torch.randn(3, 5, H).to(torch.float32 if ends else torch.float16)
    want = run(tmp_path / "half.onnx", x=x)[0]
    assert torch.allclose(found(x).float(), want.float(), rtol=5e-3, atol=5e-3)  # float16 has 11 bits

"""A file whose export froze the experts of one sample is told as broken, and not made quicker."""

import onnx
import pytest
import torch

import moeopt
from moeopt.errors import UsageError
from tests.onnx_in import by_hand
from tests.onnx_in.hit_loops import E, H, hit_loop
from tests.onnx_in.toys import run


def test_a_loop_over_all_experts_is_no_frozen_one(tmp_path):
    path = hit_loop("all", tmp_path / "all.onnx", 3)
    found = moeopt.optimize(path, verify="fast")
    (block,) = found.report.blocks
    assert (block.name, block.status, block.experts) == ("experts", "rewritten", E)
    x = torch.randn(9, H)
    assert torch.allclose(found(x), run(path, x=x)[0], rtol=1e-5, atol=1e-5)


def test_experts_that_the_sample_did_not_hit_are_missed(tmp_path):
    found = moeopt.optimize(hit_loop("hit", tmp_path / "some.onnx", 3))
    (block,) = found.report.blocks
    assert block.status == "declined" and not found.report.rewritten
    assert f"its router scores {E} experts, and the file holds {block.experts}" in block.reason
    assert block.reason.startswith("the file is broken, unless some scores are meant for no expert (null experts)")
    assert "export it again with a form of the experts that does not depend on the sample" in block.reason
    assert any(note.startswith("experts: the file is broken") for note in found.certificate.notes)


@pytest.mark.parametrize("tokens", [3, 40])
def test_rows_that_are_constants_are_told_also_where_every_expert_is_there(tokens, tmp_path):
    path = hit_loop("rows", tmp_path / "rows.onnx", tokens)
    found = moeopt.optimize(path, torch.randn(40, H))
    (block,) = found.report.blocks
    assert block.status == "declined" and (block.experts == E) is (tokens == 40)
    assert "gives an expert the rows of the sample that the model was traced with, as constants" in block.reason
    assert "(Gather)" in block.reason


@pytest.mark.parametrize("over", ["slices", "splits"])
def test_counts_that_are_constants_are_told_also_where_every_expert_is_there(over, tmp_path):
    path = hit_loop(over, tmp_path / "counts.onnx", 40)
    found = moeopt.optimize(path, torch.randn(40, H))
    (block,) = found.report.blocks
    assert (block.status, block.experts) == ("declined", E)
    assert block.reason.startswith("the file is broken: the node '/S") and f"(S{over[1:-1]}) gives its" in block.reason
    assert "as many rows as they had in the sample that the model was traced with (" in block.reason


@pytest.mark.parametrize("inputs", [None, torch.zeros(2, H)])
def test_a_frozen_file_that_does_not_run_on_other_tokens_is_told_as_broken(inputs, tmp_path):
    path = hit_loop("any", tmp_path / "any.onnx", 1)
    with pytest.raises(UsageError, match=f"In experts the file is broken, .* its router scores {E} experts, and"):
        moeopt.optimize(path, inputs)


def test_masks_that_are_asked_hold_for_other_tokens_where_every_expert_is_there(tmp_path):
    path = hit_loop("any", tmp_path / "any.onnx", 40)
    found = moeopt.optimize(path, verify="fast")
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(1))
    assert [b.status for b in found.report.blocks] == ["rewritten"]
    assert torch.allclose(found(x), run(path, x=x)[0], rtol=1e-5, atol=1e-5)


class Nearest(torch.nn.Module):
    """A token's experts are those of the nearest centroids: cdist multiplies by a matrix that it makes of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centroids", torch.randn(4, H))
        nn = torch.nn
        self.gate = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(4))

    def forward(self, x):
        _, ids = torch.cdist(x, self.centroids).topk(2, -1, largest=False)
        weights, y = self.gate(x).gather(1, ids).softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            y = y.index_add(0, row, expert(x[row]) * weights[row, slot, None])
        return y


def test_as_many_centroids_as_experts_are_no_missing_ones(tmp_path):
    """The centroids have more features than there are experts."""
    torch.manual_seed(0)
    model, x = Nearest().eval(), torch.randn(7, H)
    path = str(tmp_path / "home.onnx")
    torch.onnx.export(
        model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}, opset_version=18
    )
    found = moeopt.optimize(path, verify="fast")
    (block,) = found.report.blocks
    assert (block.status, block.experts, block.reason) == ("rewritten", 4, "")
    torch.testing.assert_close(found(x), run(path, x=x)[0], rtol=1e-4, atol=1e-5)


class OtherColumns(torch.nn.Module):
    """Scores that are made of more columns than there are experts."""

    def __init__(self, by):
        super().__init__()
        nn = torch.nn
        self.by, self.qkv = by, nn.Linear(H, 12)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(4))

    def scores(self, x, results):
        if self.by == "the experts' results":
            return results.norm(dim=-1)
        query, key, value = self.qkv(x).view(-1, 3, 4).unbind(1)
        return ((query[..., None] * key[:, None]).softmax(-1) @ value[..., None])[..., 0]

    def forward(self, x):
        results = torch.stack([expert(x) for expert in self.experts], 1)
        weights, ids = self.scores(x, results).softmax(-1).topk(2, -1)
        return (results.gather(1, ids[..., None].expand(-1, -1, H)) * weights[..., None]).sum(1)


@pytest.mark.parametrize(
    ("by", "status"), [("attention among the experts", "rewritten"), ("the experts' results", "declined")]
)
def test_columns_that_are_no_scores_miss_no_expert(by, status, tmp_path):
    """An attention makes four scores of twelve columns; a norm makes one of a result of sixteen."""
    torch.manual_seed(0)
    path = str(tmp_path / "home.onnx")
    torch.onnx.export(
        OtherColumns(by).eval(), (torch.randn(7, H),), path, dynamo=False, input_names=["x"],
        dynamic_axes={"x": {0: "n"}}, opset_version=18,
    )  # fmt: skip
    (block,) = moeopt.optimize(path, verify="fast").report.blocks
    assert (block.status, block.experts) == (status, 4) and "the file is broken" not in block.reason


class Pairs(torch.nn.Module):
    """Four experts, and one for each two of them that runs for a token with the sum of their weights."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.gate = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(4))
        self.pairs = nn.ModuleList(nn.Sequential(nn.Linear(H, 6), nn.GELU(), nn.Linear(6, H)) for _ in range(2))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        weights, ids = scores.topk(2)
        each = torch.zeros_like(scores).scatter(1, ids, weights)
        y = torch.stack([expert(x) * each[:, n, None] for n, expert in enumerate(self.experts)]).sum(0)
        shares = each.view(-1, 2, 2).sum(-1)
        return y + torch.stack([pair(x) * shares[:, n, None] for n, pair in enumerate(self.pairs)]).sum(0)


def test_experts_that_several_experts_share_are_not_missed(tmp_path):
    path = tmp_path / "pairs.onnx"
    torch.manual_seed(0)
    torch.onnx.export(
        Pairs().eval(), (torch.randn(12, H),), str(path), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}
    )
    blocks = moeopt.optimize(path, verify="fast").report.blocks
    assert {b.name: b.experts for b in blocks} == {"experts": 4, "pairs": 2}
    assert not any("broken" in b.reason for b in blocks), [b.reason for b in blocks]


class BySample(torch.nn.Module):
    """Experts of a sample by a condition of its own, which is no part of what the experts read."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.gate = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(4))

    def forward(self, x, condition):
        ids, y = self.gate(condition).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (sample,) = torch.where(ids == number)
            if len(sample):
                y[sample] = y[sample] + expert(x[sample])
        return y


def test_experts_of_samples_are_missed_too(tmp_path):
    path = tmp_path / "samples.onnx"
    torch.manual_seed(0)
    call = torch.randn(3, 5, H), torch.randn(3, H)
    axes = {"x": {0: "n", 1: "m"}, "c": {0: "n"}}
    torch.onnx.export(
        BySample().eval(), call, str(path), dynamo=False, input_names=["x", "c"], dynamic_axes=axes, opset_version=17
    )
    (block,) = moeopt.optimize(path, call, verify="fast").report.blocks
    assert f"its router scores 4 experts, and the file holds {block.experts}" in block.reason and block.experts < 4


@pytest.mark.parametrize("shared", [("up", "down", "bias"), ("up",), ("down",), ("bias",)], ids="-".join)
def test_experts_that_share_weights_are_whole_and_rewritten(shared, tmp_path):
    """As many as are scored stand in the file; tools for graphs store equal weights once."""
    file, H, I = by_hand.File(opset=18), by_hand.H, by_hand.I
    made, held = file.table(*file.router()), {}

    def weight(name, e, *shape):
        own = (
            e % 2
            if name in {"both": ("up", "down", "bias"), "first": ("up",), "last": ("down",)}.get(shared, ())
            else e
        )
        own = 0 if name == shared else own
        return held.setdefault((name, own), None) or held.update({(name, own): file.weight(*shape)}) or held[name, own]

    def expert(x, e):
        hidden = file.node("Relu", file.node("MatMul", x, weight("up", e, H, I)))
        return file.node("Add", file.node("MatMul", hidden, weight("down", e, I, H)), weight("bias", e, H))

    model = file.model(file.weighed("x", made, expert))
    onnx.save(model, tmp_path / "m.onnx")
    found = moeopt.optimize(model, verify="off")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", 4)]
    x = torch.randn(5, H)
    torch.testing.assert_close(found(x=x), run(tmp_path / "m.onnx", x=x)[0], rtol=1e-4, atol=1e-5)


def test_one_that_is_missing_among_those_that_share_weights_is_told():
    file, H, I = by_hand.File(), by_hand.H, by_hand.I
    made, up = file.table(*file.router()), file.weight(H, I)

    def expert(x, e):
        return file.node("MatMul", file.node("Relu", file.node("MatMul", x, up)), file.weight(I, H))

    (block,) = moeopt.optimize(file.model(file.weighed("x", made, expert, 3)), verify="off").report.blocks
    assert block.reason.startswith(
        "the file is broken, unless some scores are meant for no expert (null experts), which a file does not tell: "
        "its router scores 4 experts, and the file holds 3"
    )


def test_equal_experts_that_are_computed_once_are_not_missing():
    """Tools for graphs merge equal nodes."""
    file = by_hand.File()
    made, results = file.table(*file.router()), [file.expert("x", f"experts.{e}") for e in range(3)]
    model = file.model(file.weighed("x", made, lambda x, e: results[e % 3]))
    (block,) = moeopt.optimize(model, verify="off").report.blocks
    (last,) = [n.name for n in model.graph.node if n.output[0] == results[0]]
    assert block.reason == (
        "some of its experts are equal, and the file computes these once: several columns of the router weigh what the "
        f"node {last!r} (MatMul) gives, and moeopt reads one column for each expert; optimise the file from before a "
        "tool merged equal nodes (onnxslim, onnxsim), or the PyTorch model"
    )

"""Mixtures of a file that are no chains of products: listed with their reasons, or rewritten where they are a function
of a row; a region in which nothing is read has an entry too."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import moeopt
from moeopt.backends.onnxrt.onnx_file import beside_regions
from moeopt.backends.onnxrt.onnx_file.beside_regions import _in_the_file
from moeopt.report import BlockReport
from tests.onnx_in.toys import export, run
from tests.zoo import CASES

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
MORE = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(4))
MATRICES = "its experts are one matrix each, and every row passes all of them, weighed by a gate"


def file_of(model, path, exporter="torchscript"):
    return export(model.eval(), path, exporter, inputs=(X,))


def stack(*sizes):
    return nn.Parameter(torch.randn(*sizes) / 4)


class Neurons(nn.Module):
    """Experts of one neuron each, in two tables (PEER, without product keys)."""

    def __init__(self):
        super().__init__()
        self.query, self.down, self.up = nn.Linear(16, 9, bias=False), nn.Embedding(9, 16), nn.Embedding(9, 16)

    def forward(self, x):
        scores, ids = self.query(x).topk(3)
        hidden = torch.einsum("btd,btkd->btk", x, self.down(ids)).relu() * scores.softmax(-1)
        return torch.einsum("btk,btkd->btd", hidden, self.up(ids))


class RoutedValues(nn.Module):
    """An attention whose values are a mixture of projections (SwitchHead), all of which run, weighed where a chosen
    number is theirs."""

    def __init__(self, count=4):
        super().__init__()
        self.qk, self.router, self.values = nn.Linear(16, 32), nn.Linear(16, count), stack(count, 16, 16)

    def forward(self, x):
        q, k = self.qk(x).chunk(2, -1)
        weights, ids = self.router(x).sigmoid().topk(2)
        mixed = sum((weights * (ids == e)).sum(-1, keepdim=True) * (x @ w) for e, w in enumerate(self.values))
        return (q @ k.transpose(1, 2)).softmax(-1) @ mixed


@pytest.mark.parametrize(
    ("make", "experts", "reason"),
    [
        (lambda: CASES["gated_matrices_behind_a_shared_one"].build(), None, MATRICES),
        (lambda: CASES["neurons_by_their_place"].build(), 4, "groups of the 32 hidden neurons of one FFN"),
        (lambda: CASES["vectors_of_a_gate"].build(), 4, "its experts are vectors, the rows of vectors"),
        (Neurons, 9, "its experts are single neurons: each id that the router picks is one row of down_weight"),
        (CASES["mixture_of_heads"].build, 4, "its experts are the 4 heads of an attention"),
        (CASES["mixture_of_softmaxes"].build, 4, "its experts are 4 parts of one product"),
    ],
    ids=["matrices", "masked-neurons", "vectors", "neurons", "heads", "softmaxes"],
)
def test_a_mixture_without_chains_is_in_the_report(make, experts, reason, tmp_path):
    torch.manual_seed(0)
    report = moeopt.explain(file_of(make(), tmp_path / "home.onnx"))
    blocks = [b for b in report.blocks if b.kind == "moe"]
    assert blocks and all(b.status == "declined" and reason in b.reason for b in blocks), report
    names = [f"mixture_{n}" for n in range(len(blocks))]
    assert [b.name for b in blocks] == (["up"] if MATRICES in reason else names)
    assert experts is None or blocks[0].experts == experts
    assert "and each block says why" in report.notes[0]


class Cells(nn.Module):
    """A space of cells with a norm inside, all of which run; ``pick`` takes results of those that were chosen."""

    def __init__(self, cells=6):
        super().__init__()
        self.router = nn.Linear(16, cells)
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 16)) for _ in range(cells)
        )

    def forward(self, x):
        rows = x.reshape(-1, 16)
        return (rows + self.pick(rows, torch.stack([cell(rows) for cell in self.cells], 1))).view(x.shape)


class TwoCells(Cells):
    def pick(self, rows, every):
        weights, ids = self.router(rows).softmax(-1).topk(2)
        return (every.gather(1, ids[..., None].expand(-1, -1, 16)) * weights[..., None]).sum(1)


class OneCell(Cells):
    def pick(self, rows, every):
        return every[torch.arange(rows.shape[0]), self.router(rows).argmax(-1)]


class Flagged(Cells):
    """Every cell whose flag is set, of which there may be any number; the router reads other rows than the cells."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(16, 16)

    def forward(self, x):
        flags, rows = self.router(x) > 0, self.into(x).relu()
        outs = [cell[3](nn.functional.gelu(cell[0](rows))) for cell in self.cells]
        return sum(y.masked_fill(~flags[..., e, None], 0.0) for e, y in enumerate(outs))


@pytest.mark.parametrize(("make", "count"), [(TwoCells, 6), (OneCell, 6), (Flagged, 6), (RoutedValues, 4)])
def test_cells_that_are_picked_after_they_ran_are_rewritten(make, count, tmp_path):
    torch.manual_seed(0)
    path = file_of(make(), tmp_path / "home.onnx")
    fast = moeopt.optimize(path, verify="fast")
    (block,) = fast.report.blocks
    assert (block.status, block.experts, fast.certificate.passed) == ("rewritten", count, True), block.reason
    for x in (X, MORE):
        torch.testing.assert_close(fast(x), run(path, in0=x)[0], rtol=1e-4, atol=1e-5)


def test_flags_of_any_number_are_routing_in_pytorch_too():
    torch.manual_seed(0)
    model = Flagged().eval()
    fast = moeopt.optimize(model, X, verify="fast")
    (block,) = [b for b in fast.report.blocks if b.kind == "moe"]
    assert (block.status, block.experts) == ("rewritten", 6), block.reason
    torch.testing.assert_close(fast(MORE), model(MORE), rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    """Attention and a dense FFN: a softmax, and no mixture."""

    def __init__(self):
        super().__init__()
        self.query, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        x = x + (self.query(x) @ x.transpose(1, 2)).softmax(-1) @ x
        return x + self.down(self.up(x).relu())


def test_a_file_without_mixtures_says_so(tmp_path, monkeypatch):
    path = file_of(Plain(), tmp_path / "home.onnx")
    report = moeopt.explain(path)
    assert not report.blocks and report.notes[0] == "there is no block of experts in the file: it is left as it is"
    monkeypatch.setattr(beside_regions, "_MOST_NODES", 3)
    torch.manual_seed(0)
    many = file_of(CASES["vectors_of_a_gate"].build(), tmp_path / "more.onnx")
    told = moeopt.explain(many)
    assert not told.blocks
    (note,) = [n for n in told.notes if n.startswith("mixtures other than pairs of products were not looked for")]
    assert "nodes, and one of more than 3 is not run and read once more" in note and "moeopt.from_onnx(path)" in note


class OfRows(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.reshape(-1, 16)).view(x.shape)


def test_a_region_that_is_not_summed_has_one_entry(tmp_path):
    """Its weights stand in no child of the graph's module, and are no mixture beside it."""
    torch.manual_seed(0)
    path = file_of(OfRows(CASES["columns_of_one_layer"].build()), tmp_path / "home.onnx")
    names = [b.name for b in moeopt.explain(path).blocks if b.kind == "moe"]
    assert names and not [n for n in names if n.startswith("mixture")], names


class Bag(nn.Module):
    """A memory whose bag the exporter writes as a loop that the interpreter does not run."""

    def __init__(self):
        super().__init__()
        self.query, self.values = nn.Linear(16, 9), nn.EmbeddingBag(9, 16, mode="sum")

    def forward(self, x):
        scores, ids = self.query(x.reshape(-1, 16)).topk(3)
        return self.values(ids, per_sample_weights=scores.softmax(-1)).view_as(x)


def test_a_graph_that_is_not_read_whole_says_so(tmp_path):
    torch.manual_seed(0)
    report = moeopt.explain(file_of(Bag(), tmp_path / "home.onnx"))
    assert not report.blocks
    (note,) = [n for n in report.notes if n.startswith("mixtures other than pairs of products were not looked for: ")]
    assert "has no form as a module: the node '/values/Loop' is Loop" in note


def test_codes_are_not_made_floats_for_it(tmp_path):
    torch.manual_seed(0)
    model = onnx.load(file_of(CASES["vectors_of_a_gate"].build(), tmp_path / "home.onnx"))
    table = next(t for t in model.graph.initializer if t.name == "vectors")
    codes = (numpy_helper.to_array(table) * 100).astype(np.int8)
    model.graph.initializer.remove(table)
    model.graph.initializer.extend(
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(np.array(0.01, np.float32), "scale")]
    )
    model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["vectors"]))
    report = moeopt.explain(model)
    assert not report.blocks and report.notes[-1].endswith("were not looked for among weights that are codes")


class SharedDown(nn.Module):
    """Adapters behind one narrow matrix that all of them read, chosen for each token, beside a frozen layer."""

    def __init__(self):
        super().__init__()
        self.base, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 4), nn.Linear(16, 4, bias=False)
        self.up = stack(4, 4, 24)

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        weights, ids = probs.topk(2, -1)
        table = torch.zeros_like(probs).scatter(-1, ids, weights)
        return self.base(x) + (torch.einsum("btr,ero->bteo", self.down(x), self.up) * table[..., None]).sum(-2)


def test_adapters_behind_one_matrix_are_rewritten_in_the_file_and_as_a_module(tmp_path):
    torch.manual_seed(0)
    path = file_of(SharedDown(), tmp_path / "home.onnx")
    for subject, inputs in ((path, None), (moeopt.from_onnx(path), X)):
        found = moeopt.optimize(subject, inputs, backend="onnxruntime", verify="fast")
        assert [(b.status, b.experts) for b in found.report.blocks if b.kind == "moe"] == [("rewritten", 4)]
        torch.testing.assert_close(found(MORE), run(path, in0=MORE)[0], rtol=1e-4, atol=1e-5)


def test_what_is_rewritten_as_a_module_alone_says_so():
    block = _in_the_file(BlockReport("inner", "moe", "rewritten", "", 4), "mixture_0")
    assert (block.name, block.status, block.experts) == ("mixture_0", "declined", 4)
    assert block.reason == (
        "in a file, blocks are cut out around products that each expert has for its own, from the same rows to one "
        "sum, and its experts have no such products (one may be shared by all of them); read as a module it can be "
        "rewritten: moeopt.optimize(moeopt.from_onnx(path), inputs, backend='onnxruntime')"
    )


def test_weights_that_are_the_same_for_every_token_are_no_router(tmp_path):
    path = file_of(CASES["adapters_weighed_by_layer"].build(), tmp_path / "home.onnx")
    (block,) = moeopt.explain(path).blocks
    assert "no router weighs them (a plain sum, or weights that are the same for every token)" in block.reason

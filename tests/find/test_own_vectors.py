"""Experts that share every matrix, or have none, are one entry; what an engine can take of them, it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.find.discover import discover

D, H, N = 16, 24, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, N), nn.Linear(D, H), nn.Linear(H, D)
        self.wide = nn.ParameterList(nn.Parameter(torch.randn(H)) for _ in range(N))
        self.own = nn.ParameterList(nn.Parameter(torch.randn(D)) for _ in range(N))
        self.table = nn.Parameter(torch.randn(N, D))

    def expert(self, number, x):
        raise NotImplementedError

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        total = torch.zeros_like(rows)
        for number in range(N):
            row, slot = torch.where(ids == number)
            total.index_add_(0, row, self.expert(number, rows[row]) * weights[row, slot, None])
        return total.view(x.shape)


class Adapters(Block):
    """IA3, and VeRA with shared matrices."""

    def expert(self, number, x):
        return self.down(F.gelu(self.up(x) * self.wide[number])) * self.own[number]


class Scales(Block):
    def expert(self, number, x):
        return x * self.own[number]


class RowsOfATable(Block):
    def expert(self, number, x):
        return torch.tanh(x * self.table[number])


class Norms(Block):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(N))
        for norm in self.norms:
            nn.init.normal_(norm.weight)

    def expert(self, number, x):
        return self.norms[number](x)


class Sorted(Block):
    """Each expert reads its part of the sorted rows."""

    def forward(self, x):
        rows = x.reshape(-1, D)
        weight, ids = self.gate(rows).softmax(-1).max(-1)
        order = ids.argsort()
        parts = rows[order].split(torch.bincount(ids, minlength=N).tolist())
        done = torch.cat([torch.tanh(part * self.own[n]) for n, part in enumerate(parts)])
        return (torch.empty_like(done).index_copy(0, order, done) * weight[:, None]).view(x.shape)


class AllRun(Block):
    """Every expert runs on every row; a column of the gate weighs it."""

    def forward(self, x):
        score = self.gate(x).softmax(-1)
        return sum(score[..., n, None] * self.down(F.gelu(self.up(x) * self.wide[n])) for n in range(N))


class AllRunJoined(Block):
    def forward(self, x):
        done = torch.stack([torch.tanh(x * self.own[n]) for n in range(N)], -2)
        return (self.gate(x).softmax(-1)[..., None] * done).sum(-2)


FORMS = [Adapters, Scales, RowsOfATable, Norms, Sorted, AllRun, AllRunJoined]
X = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))


def made(form):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), form()).eval()


@pytest.mark.parametrize("form", FORMS)
def test_one_entry_names_the_experts_and_an_engine_takes_them(form):
    model = made(form)
    (entry,) = moeopt.explain(model, X).blocks
    assert (entry.kind, entry.experts, entry.status) == ("moe", N, "declined"), str(entry)
    assert "would not pay here" in entry.reason and "0 matmuls" not in entry.reason
    fast = moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
    (entry,) = fast.report.blocks
    assert (entry.status, entry.experts) == ("rewritten", N)
    for x in (X, X[:1, :1]):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "words"), [(Adapters, "two matmuls with a vector multiplied, "), (Scales, "are a vector multiplied, ")]
)
def test_the_reason_names_the_vector(form, words):
    (entry,) = moeopt.explain(made(form), X).blocks
    assert words in entry.reason and "none that the op carries" not in entry.reason


class Constants(Block):
    def expert(self, number, x):
        return self.own[number].expand_as(x)


def test_vectors_that_meet_no_row_are_named_as_such():
    (entry,) = moeopt.explain(made(Constants), X).blocks
    assert (entry.kind, entry.experts) == ("moe", N)
    assert entry.reason == (
        "its experts are vectors (own.#), and a token's result is the weighed sum of those that its router chose: no "
        "expert reads the token's row, so there is nothing to group; this block stays as it is"
    )


class Towers(nn.Module):
    """Vectors of towers whose joined results a later mixture of as many experts reads: no mixture themselves."""

    def __init__(self, kept):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(N))
        self.mix, self.kept = nn.Linear(N * D, D), kept
        self.moe = Adapters()

    def forward(self, x):
        x = x[x.sum(-1) > -100] if self.kept else x  # padding left out: all towers read the rows of one pick
        return self.moe(self.mix(torch.cat([norm(x) for norm in self.norms], -1)))


class Layers(nn.Module):
    """Norms one behind another, on rows that a mask kept."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(N))

    def forward(self, x):
        x = x[x.sum(-1) > -100]
        for norm in self.norms:
            x = torch.tanh(norm(x))
        return x


@pytest.mark.parametrize("kept", [False, True])
def test_towers_and_layers_are_no_experts(kept):
    names = [b.name for b in moeopt.explain(Towers(kept).eval(), X).blocks]
    assert names == ["moe"]
    assert moeopt.explain(Layers().eval(), X).blocks == ()


def kinds():
    return [nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D)), nn.Identity(), nn.Linear(D, D), nn.Tanh()]


class OfKinds(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(kinds())

    def expert(self, number, x):
        return self.experts[number](x)


def test_experts_of_different_kinds_are_one_entry():
    (entry,) = moeopt.explain(made(OfKinds), X).blocks
    assert (entry.kind, entry.experts) == ("moe", N)
    assert entry.reason.startswith("its experts are of different kinds (Sequential, Identity, Linear and 1 more), and")


class Depth(Block):
    """Norms of layers, one behind another, whose results a gate weighs: each layer has a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(N))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(N))

    def forward(self, x):
        score, done = self.gate(x).softmax(-1), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(layer(x))
            done.append(norm(x) * score[..., len(done), None])
        return sum(done)


class Branches(Depth):
    """The same layers side by side, chosen by attention (a selective kernel)."""

    def forward(self, x):
        done = torch.stack([n(F.relu(m(x))) for m, n in zip(self.layers, self.norms, strict=True)], -2)
        return (self.gate(x).softmax(-1)[..., None] * done).sum(-2)


class Heads(Block):
    """Biases of heads, in a sequence of as many places as there are heads."""

    def __init__(self):
        super().__init__()
        self.q, self.v = (nn.ModuleList(nn.Linear(D, 4) for _ in range(N)) for _ in range(2))
        self.o = nn.ModuleList(nn.Linear(4, D) for _ in range(N))

    def forward(self, x):
        x = x[:, :N]
        score = [(q(x) @ q(x).transpose(-1, -2)).softmax(-1) for q in self.q]
        return sum(o(s @ v(x)) for s, v, o in zip(score, self.v, self.o, strict=True))


class OwnScores(Norms):
    """Attention among the results themselves."""

    def forward(self, x):
        done = torch.stack([norm(x) for norm in self.norms], -2)
        return ((done * x[..., None, :]).sum(-1).softmax(-1)[..., None] * done).sum(-2)


class LearnedMix(Norms):
    """No router: the same weights for every row."""

    def forward(self, x):
        score = self.table[:, 0].softmax(-1)
        return sum(score[n] * norm(x) for n, norm in enumerate(self.norms))


@pytest.mark.parametrize("form", [Depth, Branches, Heads, OwnScores, LearnedMix])
def test_vectors_of_layers_and_heads_and_mixes_without_a_router_are_no_experts(form):
    assert [place for place in discover(form().eval(), (X,), {}) if place.kind == "moe"] == []


class AlikeBesideOthers(OfKinds):
    """Two of four are alike, and are found as experts by themselves."""

    def __init__(self):
        super().__init__()
        first, *_, last = kinds()
        self.experts = nn.ModuleList([first, nn.Linear(D, D), nn.Linear(D, D), last])


def test_ids_that_other_modules_serve_are_not_said_to_be_served_by_none():
    entries = [b for b in moeopt.explain(made(AlikeBesideOthers), X).blocks if b.kind == "moe"]
    assert [b.reason for b in entries] == [
        "its experts are of different kinds (the rows of the ids 0, 3 go to other calls than those of its alike "
        "experts), and the op runs one function on all of them; give all the same layers, or route to each group of "
        "alike experts by a block of its own"
    ]


class InItsCode(Block):
    def __init__(self):
        super().__init__()
        self.block = Experts()

    def expert(self, number, x):
        return torch.tanh(x * self.own[number])

    def forward(self, x):
        return self.block(super().forward(x))


class Experts(Block):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(N))

    def expert(self, number, x):
        return self.experts[number](x)


class Apart(nn.Sequential):
    def __init__(self):
        super().__init__(Scales(), Experts())


def test_vectors_in_the_code_of_a_module_that_holds_another_block():
    model = made(InItsCode)
    vectors, block = moeopt.explain(model, X).blocks
    assert (vectors.name, vectors.status, vectors.experts) == ("1", "declined", N)
    assert vectors.reason == (
        "the experts that were read in this module are those of another mixture, and these were not read beside them; "
        "give them, with what routes to them, a module of their own"
    )
    assert (block.name, block.status) == ("1.block", "rewritten")


def test_the_way_out_of_it():
    model = made(Apart)
    fast = moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
    assert [b.status for b in fast.report.blocks] == ["rewritten"] * 2
    torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-5)

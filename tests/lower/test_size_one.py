"""Sizes of 1 in the example are free all the same, also where another tensor has an entry for each row."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.lower.size_one import avoid_size_one
from tests.toy_moe import Block, H, build


class Marked(nn.Module):
    """``use`` of what is given beside x, in Python as ``*given``."""

    def __init__(self, use):
        super().__init__()
        self.use, self.moe = use, Block()
        self.table = nn.Parameter(torch.randn(40, H))

    def forward(self, x, *given):
        """``x`` (..., H)."""
        rows = x.reshape(-1, H)
        return self.moe(self.use(self, rows, *given)).view_as(x)


USES = {
    "ids of all tokens": (lambda self, x, ids: x + self.table[ids.reshape(-1)], lambda n: torch.arange(n) % 40),
    "marks of all tokens": (lambda self, x, mark: x * mark[:, None], lambda n: (torch.arange(n) % 3 > 0).float()),
    "two ids of all tokens": (
        lambda self, x, ids: x + self.table[ids].sum(1),
        lambda n: torch.stack([torch.arange(n), torch.arange(n) + 1], 1) % 40,
    ),
    "a vector of features": (lambda self, x, v: x + v, lambda n: torch.linspace(-1, 1, H)),
    "a single number": (lambda self, x, v: x * v, lambda n: torch.tensor([1.5])),
}


def call(name, *lead):
    x = torch.randn(*lead, H, generator=torch.Generator().manual_seed(len(lead)))
    return x, USES[name][1](x[..., 0].numel())


@pytest.mark.parametrize("lead", [(1,), (1, 6), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", USES)
def test_axes_of_one_row_get_two(name, lead):
    model = Marked(USES[name][0]).eval()
    (x, given), kwargs = avoid_size_one(model, call(name, *lead), {})
    assert x.shape == (*(max(size, 2) for size in lead[:2]), H) and not kwargs
    assert given.shape == call(name, *x.shape[:-1])[1].shape
    with torch.no_grad():
        model(x, given)


def test_a_model_that_takes_one_row_only_keeps_its_call():
    class One(nn.Module):
        def forward(self, x, mark):
            return x.reshape(1, H) * mark

    given = (torch.randn(1, H), torch.ones(1))
    assert avoid_size_one(One(), given, {}) == (given, {})


@pytest.mark.parametrize("lead", [(1,), (1, 6)], ids=str)
def test_an_engine_of_one_row_takes_more(lead):
    name = "ids of all tokens"
    model = build(lambda: Marked(USES[name][0]))
    engine = moeopt.optimize(model, call(name, *lead), backend="onnxruntime", verify="fast")
    for other in (lead, tuple(size + 2 for size in lead), tuple(3 * size for size in lead)):
        with torch.no_grad():
            torch.testing.assert_close(engine(*call(name, *other)), model(*call(name, *other)), rtol=1e-4, atol=1e-4)


class Given(nn.Module):
    """Experts by ids and weights that are arguments, one of each for a token."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, H, 8) / 4), nn.Parameter(torch.randn(2, 8, H) / 4)

    def forward(self, x, ids, weights):
        """``x`` (T, H), ``ids`` and ``weights`` (T, K)."""
        inner = torch.relu(torch.einsum("th,tkhi->tki", x, self.up[ids]))
        return (torch.einsum("tki,tkih->tkh", inner, self.down[ids]) * weights[..., None]).sum(1)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_size_of_one_that_a_block_holds_fixed_is_fixed_in_the_engine(tokens, recwarn):
    def given(rows):
        torch.manual_seed(rows)
        return torch.randn(rows, H), torch.arange(rows)[:, None] % 2, torch.rand(rows, 1) + 0.5

    model = build(Given)
    engine = moeopt.optimize(model, given(tokens), backend="onnxruntime", verify="fast")
    assert engine.report.blocks[0].status == "rewritten", engine.report
    assert not [w for w in recwarn if issubclass(w.category, moeopt.StaleModelWarning)]
    for rows in (1, 2, 7):
        with torch.no_grad():
            torch.testing.assert_close(engine(*given(rows)), model(*given(rows)), rtol=1e-4, atol=1e-4)
    x, ids, weights = given(3)
    with pytest.raises(moeopt.errors.UsageError, match=r"this engine holds for calls where ids.shape\[1\] == 1, as in"):
        engine(x, ids.repeat(1, 2), weights.repeat(1, 2))


class AsksForOne(nn.Module):
    """One row of rows is another case than several."""

    def __init__(self, one):
        super().__init__()
        self.one, self.moe = one, Block()

    def forward(self, x):
        """``x`` (B, L, H)."""
        x = self.one(x)
        return self.moe(x.reshape(-1, H)).view_as(x)


ONES = {
    "squeezed": lambda x: x.squeeze(0),
    "asked for": lambda x: 2 * x if x.shape[0] == 1 else x,
    "taken": lambda x: x.unbind(0)[0] if len(x) == 1 else x,
}


@pytest.mark.parametrize("name", ONES)
def test_an_engine_holds_for_the_call_that_it_was_made_with(name):
    model = build(AsksForOne, one=ONES[name])
    engine = moeopt.optimize(model, torch.randn(1, 6, H), backend="onnxruntime", verify="fast")
    assert engine.report.blocks[0].status == "rewritten", engine.report
    for length in (6, 3):
        x = torch.randn(1, length, H)
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        moeopt.errors.UsageError,
        match=r"holds for calls where x.shape\[0\] == 1|dimension 0, and the bundle was exported for 1 only",
    ):
        engine(torch.randn(2, 6, H))


@pytest.mark.parametrize("name", ONES)
def test_a_graph_holds_for_the_call_that_it_was_made_with(name):
    model, x = build(AsksForOne, one=ONES[name]), torch.randn(1, 6, H)
    graph, _ = moeopt.passes.run(model, x, verify="fast")
    assert any(node.target is torch.ops.moeopt.experts.default for node in graph.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)

"""FX in, FX out: whatever form a model comes in, one GraphModule on the same weights comes back, with the records."""

import warnings

import pytest
import torch
from torch import fx, nn

from moeopt import passes
from moeopt.errors import StaleModelWarning, UsageError
from moeopt.passes import PIPELINE, Level
from moeopt.passes.group_experts import GroupExperts
from tests.capture.tiny import rand
from tests.recognise.tiny import GLU, E, H, MoE, seeded

X = rand(6, H)
EXPERTS = torch.ops.moeopt.experts.default


class Dense(MoE):
    """Every expert on every token: exportable before it is rewritten."""

    def mix(self, x, w, ids):
        table = (torch.nn.functional.one_hot(ids, E) * w[..., None]).sum(1)
        return torch.stack([table[:, e, None] * f(x) for e, f in enumerate(self.experts)]).sum(0)


class Hit(MoE):
    """Asks whether an expert has tokens: no graph holds that."""

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if len(t):
                y.index_add_(0, t, expert(x[t]) * w[t, k, None])
        return y


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = MoE(), nn.LayerNorm(H), MoE()

    def forward(self, x, scale=None):
        y = self.second(self.norm(self.first(x)))
        return {"y": y if scale is None else y * scale}


class LeafBlocks(fx.Tracer):
    def is_leaf_module(self, m, path):
        return isinstance(m, MoE) or super().is_leaf_module(m, path)


def as_module(model):
    return model


def as_program(model):
    return torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))


def as_graph(model):
    return fx.symbolic_trace(model)


def as_graph_of_blocks(model):
    return fx.GraphModule(model, LeafBlocks().trace(model, {"scale": None} if isinstance(model, Layers) else None))


def nodes(module):
    return [n for n in module.graph.nodes if n.target is EXPERTS]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # float32: sums in another order


@pytest.mark.parametrize(
    ("make", "form", "ops"),
    [
        pytest.param(Dense, as_module, 1, marks=pytest.mark.nightly),  # the same block as in the two last
        (Hit, as_module, 1),
        (Layers, as_module, 2),
        (Dense, as_program, 1),
        (Dense, as_graph, 1),
    ],
)
def test_one_graph_with_an_op_for_each_block(make, form, ops):
    model = seeded(make)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result, records = passes.run(form(model), X)
    stale = [str(one.message) for one in told if issubclass(one.category, StaleModelWarning)]
    assert not stale, "a check of the rewritten code ran the original"
    assert isinstance(result, fx.GraphModule) and len(nodes(result)) == ops
    assert sum(r.fired for r in records if r.name == "group_experts") == ops and all(
        r.verified for r in records if r.fired
    )
    for x in (X, rand(1, H), rand(11, H, seed=3)):  # sizes that were never given
        close(result(x), model(x))


def test_a_graph_that_calls_the_blocks_stays_that_graph():
    model = seeded(Layers)
    graph = as_graph_of_blocks(model)
    result, _ = passes.run(graph, X)
    assert [n.target for n in result.graph.nodes] == [n.target for n in graph.graph.nodes]
    before = result.first.forward.calls
    close(result(X), model(X))
    assert result.first.forward.calls == before + 1 and "forward" not in graph.first.__dict__


@pytest.mark.parametrize("form", [as_module, as_program, as_graph])
def test_where_nothing_fires_it_is_a_graph_module_too(form):
    model = seeded(GLU)
    result, records = passes.run(form(model), X)
    assert isinstance(result, fx.GraphModule) and not nodes(result) and not any(r.fired for r in records)
    assert torch.equal(result(X), model(X))


def test_a_model_that_no_graph_can_hold_is_one_call_and_says_why():
    model = seeded(Hit)
    with pytest.warns(UserWarning, match="the GraphModule holds Hit as one call: Hit cannot be saved: .*ata-dependent"):
        result, records = passes.run(model, X, only_passes="split_dense_ffn")
    assert isinstance(result, fx.GraphModule) and [n.op for n in result.graph.nodes] == [
        "placeholder", "call_module", "output",
    ]  # fmt: skip
    assert torch.equal(result(X), model(X))
    assert [r.reason for r in records] == [
        "skipped: only_passes names split_dense_ffn; without group_experts no other pass applies"
    ]


def test_a_program_of_one_size_says_how_to_export_it():
    _, records = passes.run(torch.export.export(seeded(Dense), (X,)), X, verify="off")
    reason = next(r.reason for r in records)
    assert "Guard failed: x.size()[0] == 6, on inputs that moeopt made like the example's" in reason
    assert "the program was exported for one size; export it with dynamic_shapes for the sizes that vary" in reason


def test_keywords_stay_keywords():
    result, _ = passes.run(seeded(Layers), {"x": X, "scale": torch.tensor(2.0)})
    close(result(x=X, scale=torch.tensor(2.0)), seeded(Layers)(X, torch.tensor(2.0)))


def test_it_composes_with_torch_compile():
    model = seeded(MoE)
    result, _ = passes.run(model, X)
    compiled = torch.compile(result, backend="aot_eager", fullgraph=True)
    for x in (X, rand(9, H)):
        close(compiled(x), model(x))


def test_the_weights_are_the_users_own():
    model = seeded(MoE)
    result, _ = passes.run(model, X)
    assert {id(p) for p in result.parameters()} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        model.experts[1][2].weight.mul_(3.0)
    close(result(X), model(X))
    result(X).sum().backward()
    assert model.router.weight.grad is not None


class Silly:
    """Counts the blocks that it sees."""

    name, level = "silly", Level.EXACT

    def __init__(self):
        self.seen = []

    def apply(self, block):
        self.seen.append(block.name)
        return 0


def test_a_pass_of_ones_own():
    mine = Silly()
    _, records = passes.run(seeded(Layers), X, passes=(*PIPELINE, mine), verify="off")
    assert mine.seen == ["first", "second"] and [r.name for r in records if r.block == "first"][-1] == "silly"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (GroupExperts(), "it must be a tuple of passes, like "),
        ("group_experts", "passes='group_experts': it must be a tuple of passes, like "),
        (["fuse"], "passes: 'fuse' is a name: give the pass itself, or only_passes='fuse'"),
        ([len], "<built-in function len> is no pass, for it has no name; see docs/add-a-pass.md"),
        ([GroupExperts], "is no pass, for it is a class: give an instance"),
        ([GroupExperts(), GroupExperts()], "passes: two passes are named 'group_experts': give each a name of its own"),
    ],
)
def test_what_is_no_list_of_passes_is_refused(wrong, text):
    with pytest.raises(UsageError) as caught:
        passes.run(seeded(MoE), X, passes=wrong)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("subject", "fields", "text"),
    [
        ("model.onnx", {}, "passes.run takes a module and gives a GraphModule: give what moeopt.from_onnx or a"),
        (
            GLU(),
            {"backend": "onnxruntime"},
            "passes.run gives one GraphModule for PyTorch, so it takes no backend=: leave",
        ),
        (GLU(), {"out": "folder"}, "so it takes no out=: leave it out, or call moeopt.optimize"),
    ],
)
def test_what_gives_no_graph_module_is_refused(subject, fields, text):
    with pytest.raises(UsageError) as caught:
        passes.run(subject, X, **fields)
    assert text in str(caught.value)

"""Places worth a look: experts side by side, idle twins, slices of a stack; and what is none of these."""

import collections
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import CaptureError
from moeopt.find.discover import discover
from tests.capture.tiny import rand
from tests.recognise.tiny import GLU, H, I, MoE, ffn, seeded


class Layer(nn.Module):
    def __init__(self, ff):
        super().__init__()
        self.norm, self.ff = nn.LayerNorm(H), ff

    def forward(self, x):
        return x + self.ff(self.norm(x))


class Model(nn.Module):
    def __init__(self, *ffs):
        super().__init__()
        self.layers = nn.ModuleList(Layer(ff) for ff in ffs)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class StackLoop(MoE):
    """Slices of a stack; ``hit`` experts only."""

    def __init__(self, hit=4):
        super().__init__()
        del self.experts
        self.hit = hit
        self.w1, self.w2 = nn.Parameter(rand(4, H, I)), nn.Parameter(rand(4, I, H, seed=1))

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in range(self.hit):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, F.relu(x[t] @ self.w1[e]) @ self.w2[e] * w[t, k, None])
        return y


class Bmm(StackLoop):
    def mix(self, x, w, ids):
        full = torch.zeros(len(x), 4).scatter(1, ids, w)
        outs = torch.bmm(F.relu(torch.bmm(x.expand(4, *x.shape), self.w1)), self.w2)
        return torch.einsum("te,eth->th", full, outs)


class NormedStacks(StackLoop):
    """No chain is readable: a norm stands between the products of each expert."""

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in range(4):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, F.layer_norm(x[t] @ self.w1[e], (I,)).relu() @ self.w2[e] * w[t, k, None])
        return y


class StackedHeads(nn.Module):
    """Attention whose heads are stacks, as ports from JAX have them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(rand(4, H, 6, seed=n)) for n in range(3))
        self.o = nn.Parameter(rand(4, 6, H, seed=3))

    def forward(self, x):
        q, k, v = (torch.einsum("th,nhd->ntd", x, w) for w in (self.q, self.k, self.v))
        return torch.einsum("ntd,ndh->th", (q @ k.mT).softmax(-1) @ v, self.o)


class OneHit(MoE):
    """On these inputs a single expert is called; its twins idle."""

    def mix(self, x, w, ids):
        return self.experts[2](x) * w[:, :1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(H, 3 * H), nn.Linear(H, H)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o((q @ k.t()).softmax(-1) @ v)


def places(model, x=None):
    return discover(model, (rand(24, H, seed=7) if x is None else x,), {})


@pytest.mark.parametrize(
    ("make", "experts"),
    [(MoE, 4), (lambda: MoE(GLU), 4), (StackLoop, 4), (Bmm, 1), (lambda: StackLoop(hit=1), 1), (OneHit, 1)],
)
def test_each_form_of_experts_is_a_place(make, experts):
    model = seeded(lambda: Model(make()))
    (place,) = places(model)
    assert (place.kind, place.call.path, len(place.candidates)) == ("moe", "layers.0.ff", experts)
    assert [c.path for c in place.levels] == ["layers.0.ff", "layers.0", ""]
    own = {id(p) for name, p in model.layers[0].ff.named_parameters() if not name.startswith("router.")}
    assert place.weights and place.weights <= own and ".py:" in place.source


def test_places_come_in_the_order_of_execution():
    found = places(seeded(lambda: Model(ffn(), MoE(), GLU(), Attention(), Bmm())))
    assert [(p.kind, p.call.path) for p in found] == [
        ("dense_ffn", "layers.0.ff"), ("moe", "layers.1.ff"), ("dense_ffn", "layers.2.ff"), ("moe", "layers.4.ff"),
    ]  # fmt: skip


def test_a_shared_expert_does_not_hide_the_routed_ones():
    class Shared(MoE):
        def __init__(self):
            super().__init__(shared=ffn(inner=20))

        def forward(self, x):
            return super().forward(x) + self.shared(x)

    found = places(seeded(lambda: Model(Shared())))
    assert [(p.kind, p.call.path) for p in found if p.kind == "moe"] == [("moe", "layers.0.ff")]


def test_plain_models_hold_no_experts():
    for model in (Attention(), nn.Linear(H, H), nn.Sequential(nn.Linear(H, I), nn.Linear(I, H)), nn.LayerNorm(H)):
        assert [p for p in places(model) if p.kind == "moe"] == [], type(model).__name__
    assert [p.kind for p in places(seeded(lambda: Model(ffn(), ffn(), ffn())))] == ["dense_ffn"] * 3


def test_stacks_without_a_readable_chain_are_a_place_where_a_router_stands_beside_them():
    (place,) = [p for p in places(seeded(lambda: Model(NormedStacks()))) if p.kind == "moe"]
    assert (place.call.path, place.experts) == ("layers.0.ff", 4)
    assert [p.kind for p in places(seeded(StackedHeads)) if p.kind == "moe"] == []


def test_two_towers_are_not_experts():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ffn(), ffn()

        def forward(self, x, y):
            return self.a(x), self.b(y)

    assert {p.kind for p in discover(seeded(Towers), (rand(3, H), rand(3, H, seed=1)), {})} == {"dense_ffn"}


class TasksOverExperts(MoE):
    """A gate and a tower for each task; ``result`` says whether the towers' outputs meet."""

    def __init__(self, meet):
        super().__init__()
        self.gates, self.towers = (nn.ModuleList(make() for _ in range(2)) for make in (lambda: nn.Linear(H, 4), ffn))
        self.meet = meet

    def forward(self, x):
        outs = torch.stack([f(x) for f in self.experts], 1)
        mixed = [(gate(x).softmax(-1)[:, None] @ outs).squeeze(1) for gate in self.gates]
        found = [tower(part) for tower, part in zip(self.towers, mixed, strict=True)]
        return sum(found) if self.meet else torch.sigmoid(torch.cat(found, -1))


def test_towers_behind_the_gates_of_tasks_are_no_experts_while_their_results_do_not_meet():
    (moe,) = [p for p in places(seeded(lambda: TasksOverExperts(meet=False))) if p.kind == "moe"]
    assert moe.experts == 4
    assert [p.experts for p in places(seeded(lambda: TasksOverExperts(meet=True))) if p.kind == "moe"] == [4, 2]


class GatheredSlots(StackLoop):
    """For each slot of a token the matrices that it chose."""

    def mix(self, x, w, ids):
        y = 0
        for k in range(2):
            hidden = torch.einsum("th,thi->ti", x, self.w1.index_select(0, ids[:, k])).relu()
            y = y + torch.einsum("ti,tih->th", hidden, self.w2[ids[:, k]]) * w[:, k, None]
        return y


def test_gathered_experts_are_counted_where_they_lie_and_not_by_rows():
    assert {p.experts for p in places(seeded(GatheredSlots)) if p.kind == "moe"} == {4}


def test_the_model_is_left_as_it_was_and_must_run():
    model = seeded(lambda: Model(MoE()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(
        CaptureError, match="Model raised RuntimeError: .*; check that it runs on these inputs in eager mode"
    ):
        places(model, rand(3, H + 1))


def calls_of_functions(layers, make):
    """How often each Python function is called while a model of so many layers is searched."""
    model, calls = seeded(lambda: Model(*(make(i) for i in range(layers)))), collections.Counter()

    def count(frame, event, arg):
        if event == "call" and "moeopt" in frame.f_code.co_filename:  # a collection of garbage calls others
            calls[f"{frame.f_code.co_filename}: {frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        places(model)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize(
    "make", [lambda i: MoE(), lambda i: StackLoop(hit=1), lambda i: OneHit(), lambda i: MoE() if i % 2 else ffn()]
)
def test_each_layer_of_a_deep_model_is_searched_as_often_as_one_of_a_shallow_model(make):
    calls_of_functions(4, make)  # what is computed once in a process is no cost of a layer
    four, eight, sixteen = (calls_of_functions(n, make) for n in (4, 8, 16))
    steeper = {f for f in sixteen if sixteen[f] - eight[f] > 2.2 * (eight[f] - four[f]) + 8}
    assert steeper == set()


class NestedRows(StackLoop):
    """Each expert's rows are one part of a nested tensor, whose sizes are no plain numbers."""

    def mix(self, x, w, ids):
        places = [torch.where(ids == e) for e in range(4)]
        rows = torch.nested.nested_tensor([x[t] for t, _ in places], layout=torch.jagged)
        y = torch.zeros_like(x)
        for e, part in enumerate(rows.unbind()):
            t, k = places[e]
            y.index_add_(0, t, F.relu(part @ self.w1[e]) @ self.w2[e] * w[t, k, None])
        return y


def test_nested_tensors_do_not_stop_the_search():
    (place,) = discover(seeded(NestedRows), (rand(24, H, seed=7),), {})
    assert place.kind == "moe" and place.experts == 4


class FlatExperts(nn.Module):
    """Experts in the rows of two flat matrices; expert ids are an argument, (T, K) or (T,)."""

    def __init__(self, experts=4):
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(experts * I, H)), nn.Parameter(torch.randn(experts * H, I))

    def forward(self, x, ids):
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t = torch.where(ids == e)[0]
            hidden = F.silu(x[t] @ self.w_in[e * I : (e + 1) * I].t())
            y.index_add_(0, t, hidden @ self.w_out[e * H : (e + 1) * H].t())
        return y


@pytest.mark.parametrize("named", [0, 2])
def test_experts_in_a_flat_matrix_of_which_the_example_names_one_are_a_place(named):
    (place,) = discover(seeded(FlatExperts), (rand(6, H), torch.full((6, 1), named)), {})
    assert place.kind == "moe"


def test_rows_of_a_whole_matrix_that_are_picked_are_no_experts():
    assert [p.kind for p in discover(seeded(lambda: FlatExperts(1)), (rand(6, H), torch.zeros(6, 1).long()), {})] != [
        "moe"
    ]


@pytest.mark.parametrize("named", [0, 2])
def test_such_experts_are_in_the_report_with_the_true_reason_where_ids_cannot_be_made(named):
    x = rand(6, H)
    (block,) = moeopt.optimize(seeded(FlatExperts), (x, torch.full((6, 1), named))).report.blocks
    assert block.status == "rewritten"
    (block,) = moeopt.optimize(seeded(FlatExperts), (x, torch.full((6,), named))).report.blocks
    assert block.status == "declined"
    assert "no probe token reached the expert weights w_in beyond" in block.reason
    assert "pass example inputs that reach every expert" in block.reason


class Unequal(nn.Module):
    """Experts with a norm inside, one of another width, on rows that are picked for them; or on all rows."""

    def __init__(self, picked):
        super().__init__()
        self.picked, self.gate = picked, nn.Linear(H, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, w), nn.LayerNorm(w), nn.GELU(), nn.Linear(w, H)) for w in (20, 20, 24)
        )

    def forward(self, x):
        if not self.picked:  # a plain chain of layers
            for expert in self.experts:
                x = expert(x)
            return x
        ids, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y[ids == e] = expert(x[ids == e])
        return y


def test_experts_of_unequal_sizes_are_listed_and_a_chain_of_layers_is_not():
    (place,) = discover(seeded(lambda: Unequal(True)), (rand(24, H, seed=7),), {})
    assert (place.kind, place.experts) == ("moe", 3)
    assert not [p for p in discover(seeded(lambda: Unequal(False)), (rand(24, H, seed=7),), {}) if p.kind == "moe"]

"""Blocks run whole on the runtime, their router unpinned: damage to the surroundings of the experts is caught."""

import re
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import NotEquivalentError, StaleModelWarning

pytest.importorskip("onnxruntime")

import onnx_ir as ir

from moeopt.backends.onnxrt import build as onnx_build
from moeopt.backends.onnxrt.check_routers import block_kind

H, I, E, K = 16, 24, 8, 2
EPS, SCALE = 1e-6, 2.5


class Layer(nn.Module):
    """A norm, a renormalised router of sigmoid scores written out, a factor, and E experts."""

    def __init__(self, scale: float = SCALE) -> None:
        super().__init__()
        self.scale, self.gate = scale, nn.Linear(H, E)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H)) for _ in range(E))

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        grown = torch.exp(logits)
        return grown / (1 + grown)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, H)
        normed = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + EPS)
        weights, ids = torch.topk(self.score(self.gate(flat)), K)
        weights = weights / weights.sum(-1, keepdim=True) * self.scale
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens):
                y.index_add_(0, tokens, expert(normed[tokens]) * weights[tokens, slots, None])
        return y.reshape(x.shape)


class Softmax(Layer):
    def score(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)


class Deep(nn.Module):
    """Layers with a residual: each one is a block beside others."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def model(kind: type[Layer] = Layer, deep: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Deep(kind(), kind()).eval() if deep else kind().eval()


def given() -> torch.Tensor:
    return torch.randn(2, 9, H, generator=torch.Generator().manual_seed(1))


def value_of(value) -> float | None:
    """A scalar constant's value."""
    tensor = None if value is None else value.const_value
    if tensor is None and value is not None and value.producer() is not None and value.producer().op_type == "Constant":
        tensor = value.producer().attributes["value"].as_tensor()
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def replaced(graph, node, *new) -> None:
    """Put nodes in the place of one; the last one's result is its result."""
    old = node.outputs[0]
    graph.insert_after(node, new)
    ir.convenience.replace_all_uses_with(old, new[-1].outputs[0])
    graph.remove(node, safe=True)


def drop_epsilon(graph) -> int:
    """``x + 1e-6`` becomes ``x``."""
    found = [n for n in graph if n.op_type == "Add" and any(abs((value_of(v) or 1) - EPS) < 1e-9 for v in n.inputs)]
    for node in found:
        replaced(graph, node, ir.node("Identity", [node.inputs[0]]))
    return len(found)


def coarse_sigmoid(graph) -> int:
    """``exp(x) / (1 + exp(x))`` becomes a sigmoid that is right to 1e-7 of one, and nothing below -18."""
    found = [n for n in graph if n.op_type == "Div" and n.inputs[0].producer().op_type == "Exp"]
    for node in found:
        logits = node.inputs[0].producer().inputs[0]
        half = ir.node("Mul", [logits, constant(graph, 0.5)])
        tanh = ir.node("Tanh", [half.outputs[0]])
        scaled = ir.node("Mul", [tanh.outputs[0], constant(graph, 0.5)])
        replaced(graph, node, half, tanh, scaled, ir.node("Add", [scaled.outputs[0], constant(graph, 0.5)]))
    return len(found)


def other_constant(graph) -> int:
    """The factor of the routing weights changes by 1e-5."""
    found = [n for n in graph if n.op_type == "Mul" and any(value_of(v) == SCALE for v in n.inputs)]
    for node in found:
        at = next(i for i, v in enumerate(node.inputs) if value_of(v) == SCALE)
        node.replace_input_with(at, constant(graph, SCALE * (1 + 1e-5)))
    return len(found)


def scaled_logits(graph) -> int:
    """The logits grow by a thousandth."""
    found = [n for n in graph if n.op_type == "Exp"]
    for node in found:
        scaled = ir.node("Mul", [node.inputs[0], constant(graph, 1.001)])
        graph.insert_before(node, [scaled])
        node.replace_input_with(0, scaled.outputs[0])
    return len(found)


def other_ties(graph) -> int:
    """The scores are turned round before the choice and the ids after it: ties go to the last expert, not the first."""
    found = [n for n in graph if n.op_type == "TopK"]
    for node in found:
        order = ir.val(f"order_{node.name}", const_value=ir.tensor(list(range(E))[::-1], dtype=ir.DataType.INT64))
        graph.register_initializer(order)
        turned = ir.node("Gather", [node.inputs[0], order], {"axis": -1})
        graph.insert_before(node, [turned])
        node.replace_input_with(0, turned.outputs[0])
        ids = node.outputs[1]
        last = ir.val(f"last_{node.name}", const_value=ir.tensor([E - 1], dtype=ir.DataType.INT64))
        graph.register_initializer(last)
        back = ir.node("Sub", [last, ids])
        graph.insert_after(node, [back])
        for user, at in list(ids.uses()):
            if user is not back:
                user.replace_input_with(at, back.outputs[0])
    return len(found)


def constant(graph, value: float):
    made = ir.val(f"sabotage_{len(graph.initializers)}", const_value=ir.tensor([value], dtype=ir.DataType.FLOAT))
    graph.register_initializer(made)
    return made


@pytest.fixture
def sabotage(monkeypatch):
    """Damages what the exporter makes of every program, of the whole model and of a block alone."""
    export = onnx_build.to_onnx

    def choose(damage):
        def damaged(program):
            exported = export(program)
            assert damage(exported.graph)
            return exported

        monkeypatch.setattr(onnx_build, "to_onnx", damaged)

    return choose


def test_a_right_engine_passes_on_all_rows():
    done = moeopt.optimize(model(deep=True), given(), backend="onnxruntime")
    first, second = done.certificate.blocks
    whole = [case for case in first.cases if case.name.endswith("on ONNX Runtime")]
    assert [case.name.partition(",")[0] for case in whole[:1]] == ["steered router"] and len(whole) == 3
    assert all(case.status == "passed" and case.flips == 0 for case in whole) and whole[0].tokens > 60
    assert not [case for case in second.cases if case.name.endswith("on ONNX Runtime")]  # the same program
    assert "equal with rows of zeros and tiny rows, huge rows, a row of NaN too" in done.certificate.end_to_end.notes


DAMAGES = [
    (drop_epsilon, r"(a row of zeros|a row 10\^-\d times the ordinary|ordinary row)"),
    (coarse_sigmoid, r"a row with all of its router's logits near -\d+"),
    (other_constant, "an ordinary row"),
    (scaled_logits, "an ordinary row"),
]


MORE = pytest.mark.one_isa, pytest.mark.nightly


@pytest.mark.parametrize(
    ("damage", "rows", "deep"),
    [
        pytest.param(damage, rows, deep, marks=() if damage is drop_epsilon else MORE[deep])
        for damage, rows in DAMAGES
        for deep in (False, True)
    ],
)
def test_damage_around_the_experts_is_refused(sabotage, damage, rows, deep):
    sabotage(damage)
    with pytest.raises(NotEquivalentError) as refused:
        moeopt.optimize(model(deep=deep), given(), backend="onnxruntime")
    text = str(refused.value)
    assert "run whole and with its router not pinned" in text and re.search(rows, text), text
    assert ("in layers.0, " if deep else "in Layer, ") in text and "use backend='torch'" in text


@pytest.mark.parametrize("damage", [drop_epsilon, pytest.param(coarse_sigmoid, marks=pytest.mark.nightly)])
def test_nothing_else_sees_it(sabotage, damage, monkeypatch):
    """What the given inputs do not reach is seen by these rows only."""
    monkeypatch.setattr("moeopt.backends.onnxrt.graph_backend.check_blocks", lambda *args: [])
    monkeypatch.setattr("moeopt.backends.onnxrt.compare_engine.unusual_calls", lambda call: [])
    sabotage(damage)
    assert moeopt.optimize(model(), given(), backend="onnxruntime").certificate.passed


def test_another_order_of_ties_is_told_and_not_refused(sabotage):
    x = given()
    x[0, :4] = 0
    layer = model(Softmax)
    with torch.no_grad():
        layer.gate.bias.zero_()  # rows of zeros have equal scores then
    sabotage(other_ties)
    done = moeopt.optimize(layer, x, backend="onnxruntime")
    assert done.certificate.passed and done.certificate.end_to_end.ties > 0
    for notes in (done.report.notes, done.certificate.notes):
        (note,) = [n for n in notes if n.startswith("tied rows")]
        assert "may go to other experts on ONNX Runtime than in PyTorch" in note
        assert re.search(
            r"of the 18 choices of experts that the example inputs make, 4 are such ties, of which 4", note
        )
    with torch.no_grad():
        assert torch.allclose(done(x)[1], layer(x)[1], atol=1e-5)


def test_another_choice_that_is_no_tie_is_a_flip(sabotage):
    def next_expert(graph):
        (node,) = [n for n in graph if n.op_type == "TopK"]
        one = ir.val("one", const_value=ir.tensor([1], dtype=ir.DataType.INT64))
        many = ir.val("many", const_value=ir.tensor([E], dtype=ir.DataType.INT64))
        for value in (one, many):
            graph.register_initializer(value)
        ids = node.outputs[1]
        more = ir.node("Add", [ids, one])
        wrapped = ir.node("Mod", [more.outputs[0], many])
        graph.insert_after(node, [more, wrapped])
        for user, at in list(ids.uses()):
            if user is not more:
                user.replace_input_with(at, wrapped.outputs[0])
        return 1

    sabotage(next_expert)
    with pytest.raises(NotEquivalentError, match="its router sends an ordinary row .* to experts .* rounding does not"):
        moeopt.optimize(model(Softmax), given(), backend="onnxruntime")


class Three(Softmax):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, H)
        weights, ids = torch.topk(self.score(self.gate(flat)), 3)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens):
                y.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return y.reshape(x.shape)


def test_a_router_whose_scores_tie_on_ordinary_rows_has_no_engine():
    """Equal rows of the gate: noise runs break such ties at random, and a budget made of them allows anything."""
    layer = model(Three)
    with torch.no_grad():
        layer.gate.weight[E // 2 :], layer.gate.bias[E // 2 :] = layer.gate.weight[: E // 2], layer.gate.bias[: E // 2]
    with pytest.raises(NotEquivalentError, match="equal scores to several experts on .* ordinary rows"):
        moeopt.optimize(layer, given(), backend="onnxruntime")


def test_a_gate_of_zeros_prefers_no_expert_and_is_told(tmp_path):
    """As many models begin: every score is equal on every row, and what a tie decides is counted, not refused."""
    layer = Softmax().eval()
    nn.init.zeros_(layer.gate.weight)
    nn.init.zeros_(layer.gate.bias)
    engine = moeopt.optimize(layer, given(), backend="onnxruntime")
    assert engine.certificate.passed is True
    (note,) = [n for n in engine.report.notes if n.startswith("tied rows")]
    assert re.search(r"of the 18 choices of experts that the example inputs make, 18 are such ties", note), note
    assert note in engine.certificate.notes
    assert moeopt.load(engine.save(tmp_path / "b"))(given()).shape == given().shape


def test_a_bundle_with_ties_loads_and_verifies_again(tmp_path):
    x = given()
    x[0, :4] = 0
    layer = model(Softmax)
    with torch.no_grad():
        layer.gate.bias.zero_()
    done = moeopt.optimize(layer, x, backend="onnxruntime")
    assert done.certificate.end_to_end.budget < 1e-4
    bundle = done.save(tmp_path / "b")
    loaded = moeopt.load(bundle)
    with torch.no_grad():
        assert torch.equal(loaded(x), done(x))
    assert moeopt.verify(bundle).passed
    again = moeopt.verify(bundle, original=layer, inputs=x)
    assert again.passed and again.end_to_end.ties == done.certificate.end_to_end.ties > 0
    assert moeopt.verify(done, original=layer).passed
    assert "are ties that the engine broke otherwise" in str(again)


class Counted(Softmax):
    """Its second result counts tokens by expert, whatever weight they have."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, ids = torch.topk(self.score(self.gate(x.reshape(-1, H))), K)
        return super().forward(x), nn.functional.one_hot(ids, E).float().mean((0, 1))


def test_what_is_counted_from_the_choice_follows_the_engines_ties():
    x = given()
    x[0, :4] = 0
    layer = model(Counted)
    with torch.no_grad():
        layer.gate.bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)  # noise must not bring the original code back
        done = moeopt.optimize(layer, x, backend="onnxruntime")
    assert done.certificate.passed and not torch.equal(done(x)[1], layer(x)[1])
    assert done.certificate.end_to_end.ties == 4


def test_layers_of_one_program_share_a_graph_and_other_constants_do_not():
    layers = [Layer(), Layer(), Layer(scale=2.0)]
    done = moeopt.optimize(Deep(*layers).eval(), given(), verify="off")
    kinds = [block_kind(layer) for layer in done.model.layers]
    assert kinds[0] == kinds[1] != kinds[2]

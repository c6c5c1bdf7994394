"""Of alike layers one is traced; what the graph holds for the others is what tracing them would have given."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import moeopt
from moeopt.bundle.graph import write_graph
from moeopt.lower import functional as functional_room
from moeopt.lower.functional import export_functional
from moeopt.lower.signature import size_conditions
from moeopt.lower.stamps import Stamps
from tests.helpers import assert_same

H = 8
TRACED = []


class Layer(nn.Module):
    """A norm, an attention-like mix over the sequence, a buffer and a residual; ``number`` is read by nobody."""

    def __init__(self, number):
        super().__init__()
        self.number, self.norm = number, nn.LayerNorm(H)
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)
        self.register_buffer("scale", torch.full((H,), 0.5))

    def forward(self, x):
        if isinstance(x, FakeTensor):
            TRACED.append(vars(nn.Module)["__dict__"].__get__(self)["number"])  # read past what looks at reads
        h = self.norm(x)
        h = (h @ h.transpose(1, 2)).softmax(-1) @ h
        return x + self.down(F.silu(self.up(h.reshape(-1, H)))).view(x.shape) * self.scale


class Tower(nn.Module):
    kind = Layer

    def __init__(self, count=4):
        super().__init__()
        self.layers = nn.ModuleList(self.kind(i) for i in range(count))
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def made(model, seed=0):
    torch.manual_seed(seed)
    TRACED.clear()
    return model.eval(), torch.randn(2, 3, H)


def numbered(graph):
    """The JSON of a graph with each name as the number of its node."""
    names = {n["out"]: f"%{i}" for i, n in enumerate(graph["nodes"])}

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return names.get(value, value) if isinstance(value, str) else value

    return plain(graph)


def traced_each(model, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeopt.lower.stamps.repeated_modules", lambda model: {})
        return export_functional(model, args, {})


def check(model, x, traces=(0, 1)):
    """The program is that of a trace of every layer, the layers ``traces`` were traced, and other sizes run.

    The second layer is traced too: the strides of an input are other symbols than those of what a layer computes.
    """
    TRACED.clear()
    program = export_functional(model, (x,), {})
    assert tuple(TRACED) == traces
    full = traced_each(model, x)
    (graph, tensors), (wanted, same) = write_graph(program), write_graph(full)
    assert numbered(graph) == numbered(wanted)
    assert list(tensors) == list(same) and all(tensors[k] is same[k] or torch.equal(tensors[k], same[k]) for k in same)
    assert size_conditions(program) == size_conditions(full)
    program.graph.lint()
    for size in ((2, 3), (5, 7)):
        x = torch.randn(*size, H)
        assert_same(program.module()(x), model(x), exact=True)


@pytest.mark.parametrize("count", [4, 8])
def test_the_number_of_traced_layers_does_not_grow_with_depth(count):
    check(*made(Tower(count)))


def test_the_same_holds_for_saving_an_optimised_model_and_for_an_engine(tmp_path):
    pytest.importorskip("onnxruntime")

    class Experts(Layer):
        def __init__(self, number):
            super().__init__(number)
            self.router = nn.Linear(H, 4, bias=False)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H)) for _ in range(4))
            self.mlp = Loop(self.router, self.experts)

        def forward(self, x):
            x = super().forward(x)
            return x + self.mlp(x)

    class Deep(Tower):
        kind = Experts

    counts = {}
    for count in (3, 4):
        model, x = made(Deep(count))
        opt = moeopt.optimize(model, x, verify="fast")
        assert sum(b.status == "rewritten" and b.kind == "moe" for b in opt.report.blocks) == count
        TRACED.clear()
        opt.save(tmp_path / f"{count}")
        loaded = moeopt.load(tmp_path / f"{count}")
        saved = len(TRACED)
        engine = moeopt.optimize(model, x, verify="fast", backend="onnxruntime")
        counts[count] = saved, len(TRACED) - saved
        assert [b.name for b in engine.report.blocks if b.kind == "moe"] == [f"layers.{i}.mlp" for i in range(count)]
        for size in ((2, 3), (4, 5)):
            x = torch.randn(*size, H)
            assert_same(loaded(x), opt(x), exact=True)
            torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-5)
    assert counts[3] == counts[4] and counts[3][0] == 2


class Loop(nn.Module):
    """A mixture of experts as a loop over those that were hit."""

    def __init__(self, router, experts):
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x):
        rows = x.reshape(-1, H)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y = y.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return y.view(x.shape)


class TwoKinds(Tower):
    def __init__(self):
        super().__init__(4)
        for layer in self.layers[1::2]:
            layer.up, layer.down = nn.Linear(H, 3 * H), nn.Linear(3 * H, H)


def test_each_kind_of_layer_is_traced_once():
    check(*made(TwoKinds()), traces=(0, 1, 2))


class Again(Tower):
    def forward(self, x):
        return super().forward(super().forward(x))


def test_layers_that_are_called_again():
    check(*made(Again()))


class Shared(Tower):
    """One norm for all layers, and the weights of one layer tied to another module's."""

    def __init__(self):
        super().__init__(3)
        self.head = nn.Linear(2 * H, H)
        for layer in self.layers[1:]:
            layer.norm = self.layers[0].norm
        self.layers[2].down.weight = self.head.weight

    def forward(self, x):
        return super().forward(x) + self.head(x.repeat(1, 1, 2))


def test_shared_weights():
    check(*made(Shared()))


class Pairs(Layer):
    def forward(self, x, mask=None, extra=None):
        y = super().forward(x)
        return {"y": y if mask is None else y * mask, "none": None, "extra": (extra[0] + y.mean(), 3)}


class Nested(Tower):
    kind = Pairs

    def forward(self, x, mask):
        extra = (torch.zeros(()), 1)
        for layer in self.layers:
            out = layer(x, mask=mask, extra=extra)
            x, extra = out["y"], out["extra"]
        return x, extra[0]


def test_structures_of_arguments_and_results():
    model, x = made(Nested())
    program = export_functional(model, (x, torch.ones(2, 3, 1)), {})
    assert set(TRACED) == {0, 1}
    for size in ((2, 3), (4, 5)):
        args = torch.randn(*size, H), torch.rand(*size, 1)
        assert_same(program.module()(*args), model(*args), exact=True)


class ReadsItsNumber(Layer):
    def forward(self, x):
        return super().forward(x) * (1.0 + self.number)


class AsksForItsNumber(Layer):
    def forward(self, x):
        return super().forward(x) * (2.0 if getattr(self, "number", 0) % 2 else 1.0)


class WritesToItsArgument(Layer):
    def forward(self, x):
        x += super().forward(x)
        return x * 2


class ReturnsItsArgument(Layer):
    def forward(self, x):
        super().forward(x)
        return x.view(x.shape)


class KeepsARecord(Layer):
    def forward(self, x):
        self.aux = super().forward(x)
        return self.aux + 1


LOSSES = []


class TellsOthers(Layer):
    def forward(self, x):
        y = super().forward(x)
        LOSSES.append(y.mean())
        return y


class Collects(Tower):
    kind = TellsOthers

    def forward(self, x):
        LOSSES.clear()
        return super().forward(x) + torch.stack(LOSSES).sum()


class WritesToAList(Layer):
    def forward(self, x, found):
        y = super().forward(x)
        found.append(y.mean())
        return y


class Lists(Tower):
    kind = WritesToAList

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x, found)
        return x + torch.stack(found).sum()


def tower(layer):
    return type(f"Of{layer.__name__}", (Tower,), {"kind": layer})


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("cls", "least"),
    [
        (tower(ReadsItsNumber), 4),
        (tower(AsksForItsNumber), 4),
        (tower(WritesToItsArgument), 4),
        (tower(ReturnsItsArgument), 4),
        (tower(KeepsARecord), 4),
        (Collects, 4),
        (Lists, 4),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_layer_that_does_more_than_make_tensors_is_traced_each_time(cls, least):
    model, x = made(cls())
    classes = [type(m) for m in model.modules()]
    program = export_functional(model, (x,), {})
    assert {0, 1, 2, 3} <= set(TRACED) and len(TRACED) >= least
    assert [type(m) for m in model.modules()] == classes
    assert all("forward" not in m.__dict__ for m in model.modules())
    for size in ((2, 3), (4, 5)):
        x = torch.randn(*size, H)
        assert_same(program.module()(x.clone()), model(x.clone()), exact=True)


@pytest.mark.parametrize("what", ["hook", "flag", "forward", "dtype"])
def test_a_layer_that_differs_in_what_cannot_be_seen_in_its_class_is_its_own_kind(what):
    model, x = made(Tower())
    odd = model.layers[2]
    if what == "hook":
        odd.norm.register_forward_hook(lambda module, args, out: out * 2)
    elif what == "flag":
        odd.norm.eps = 1e-2
    elif what == "forward":
        odd.norm.forward = lambda x: x * 2
    else:
        odd.scale = odd.scale.double().mul_(1.1).float().clone()
    program = export_functional(model, (x,), {})
    assert TRACED == [0, 1, 2]
    assert_same(program.module()(x), model(x), exact=True)


def test_a_layer_whose_buffer_has_other_values_is_of_the_same_kind_and_keeps_its_own_buffer():
    model, x = made(Tower())
    for layer in model.layers:
        layer.scale.copy_(torch.rand(H))
    check(model, x)


class AsksForAValue(Layer):
    def forward(self, x):
        return super().forward(x) * (2.0 if self.scale[0] > 1 else 1.0)


def test_buffers_whose_values_are_asked_for_are_each_layers_own():
    model, x = made(tower(AsksForAValue)())
    model.layers[2].scale.mul_(3)
    program = export_functional(model, (x,), {})
    assert set(TRACED) == {0, 1, 2, 3}
    assert_same(program.module()(x), model(x), exact=True)


def test_a_stamp_with_other_weights_is_caught_by_the_comparison_of_the_whole(monkeypatch):
    """Sabotage: every stamped layer reads the weights of the traced one."""
    model, x = made(Tower())
    monkeypatch.setattr("moeopt.lower.stamp_graph._pairs", lambda stamps, first, path, weights: [])
    program = export_functional(model, (x,), {})
    assert TRACED == [0, 1, 0, 1, 2, 3]
    assert_same(program.module()(x), model(x), exact=True)
    monkeypatch.setattr(functional_room, "_same", lambda program, model, call: True)
    wrong = export_functional(model, (x,), {})
    assert not torch.allclose(wrong.module()(x), model(x)), "the sabotage does nothing"


@pytest.mark.parametrize("verify", ["fast", "off"])
def test_an_engine_of_layers_that_differ_in_what_nobody_watches(verify):
    pytest.importorskip("onnxruntime")
    turn = []

    class Counted(Layer):
        def forward(self, x):
            return super().forward(x) * (1.0 + len(turn))

    class Turns(Tower):
        kind = Counted

        def forward(self, x):
            turn.clear()
            for layer in self.layers:
                x = layer(x)
                turn.append(1)
            return x

    model, x = made(Turns(3))
    engine = moeopt.optimize(model, x, verify=verify, backend="onnxruntime")
    for size in ((2, 3), (4, 5)):
        x = torch.randn(*size, H)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-5)
    assert set(TRACED) == {0, 1, 2}


def test_what_is_put_on_layers_is_taken_back_after_an_error():
    class Stops(Layer):
        def forward(self, x):
            if self.number == 2:
                raise RuntimeError("stop")
            return super().forward(x)

    model, x = made(tower(Stops)())
    stamps = Stamps(model)
    with pytest.raises(RuntimeError, match="stop"), stamps.during():
        for layer in model.layers:
            layer.number  # noqa: B018
        raise RuntimeError("stop")
    assert all(type(layer) is Stops and "forward" not in layer.__dict__ for layer in model.layers)


def test_deep_copies_of_the_model_know_nothing_of_it():
    model, x = made(Tower())
    export_functional(model, (x,), {})
    assert_same(copy.deepcopy(model)(x), model(x), exact=True)


def test_a_model_that_is_one_block_and_a_list_of_blocks_as_engines():
    """A rewritten forward of the model itself, or of a layer, stands aside while the model is traced."""
    pytest.importorskip("onnxruntime")

    def block():
        experts = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H)) for _ in range(4))
        return Loop(nn.Linear(H, 4, bias=False), experts)

    torch.manual_seed(0)
    for model, names in ((block(), [""]), (nn.Sequential(block(), block(), block()), ["0", "1", "2"])):
        x = torch.randn(2, 3, H)
        engine = moeopt.optimize(model.eval(), x, verify="fast", backend="onnxruntime")
        found = [b for b in engine.report.blocks if b.kind == "moe"]
        assert [b.status for b in found] == ["rewritten"] * len(names)
        for size in ((2, 3), (4, 5)):
            x = torch.randn(*size, H)
            torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-5)


def test_calls_with_values_and_calls_of_other_threads_run_the_layers_own_code():
    model, x = made(Tower())
    want, results = model(x), []
    stamps = Stamps(model)
    with stamps.during():
        thread = threading.Thread(target=lambda: results.append(model(x)))
        thread.start()
        thread.join()
        results.append(model(x))
    assert len(results) == 2 and all(torch.equal(r, want) for r in results)
    assert stamps.kinds == {} and stamps.layers == []


class Noticing(type):
    def __new__(meta, name, bases, table):
        made_of_it.append(name)
        return super().__new__(meta, name, bases, table)


made_of_it = []


@pytest.mark.parametrize(("metaclass", "count"), [(type, 2), (Noticing, 4)], ids=["init_subclass", "metaclass"])
def test_no_class_of_the_user_s_is_told_of_one_that_is_made_for_a_trace(metaclass, count):
    class Final(Layer, metaclass=metaclass):
        def __init_subclass__(cls):
            made_of_it.append(cls)

    made_of_it.clear()
    model, x = made(tower(Final)())
    program = export_functional(model, (x,), {})
    assert made_of_it == [] and len(TRACED) == count
    assert_same(program.module()(x), model(x), exact=True)

"""One kind of block is recorded once; whatever is hidden in another layer makes that layer take the full way."""

import collections
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.capture import tape
from moeopt.capture.alike import unlike
from moeopt.pipeline import alike_blocks, block_capture, coverage
from moeopt.rewrite import module_guard
from tests.capture.tiny import rand
from tests.recognise.tiny import E, H, MoE, seeded

LAYERS = 4
SCALES = types.SimpleNamespace(of="all")


class Block(MoE):
    """A mixture that reads all that a layer may differ in: a number, a buffer, a configuration, a list, a function."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config, self.scale, self.act, self.turns = config, 1.5, torch.sigmoid, [0.5, 2.0]
        self.shift = nn.Parameter(rand(E, seed=5))
        self.register_buffer("offset", rand(E, seed=3))
        self.register_buffer("late", torch.zeros(E), persistent=False)
        self.plain = torch.ones(E)
        self.norm = nn.LayerNorm(H)

    def route(self, x):
        scores = self.act(self.router(self.norm(x)) + self.offset + self.late + self.shift) * self.plain * self.turns[1]
        w, ids = scores.topk(self.config.top_k)
        return w * self.scale, ids


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        config = types.SimpleNamespace(top_k=2)
        self.layers = nn.ModuleList(Block(config) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def model():
    return seeded(Layers)


@pytest.fixture
def recorded(monkeypatch):
    """How often each block was recorded, by the number of the layer."""
    count = collections.Counter()

    def counted(module, *args, **options):
        count[id(module)] += 1
        return tape.record(module, *args, **options)

    for user in (block_capture, coverage):
        monkeypatch.setattr(user, "record", counted)
    return count


def optimized(subject, recorded, **options):
    """The optimised model, and how often each of its layers was recorded."""
    opt = moeopt.optimize(subject, rand(24, H, seed=7), **options)
    return opt, [recorded[id(layer)] for layer in opt.model.layers]


def test_alike_layers_are_recorded_once_and_each_is_verified(recorded):
    subject = model()
    opt, times = optimized(subject, recorded)
    assert times[0] > 0 and times[1:] == [0] * (LAYERS - 1)
    assert [b.status for b in opt.report.blocks] == ["rewritten"] * LAYERS
    names = [f"layers.{n}" for n in range(LAYERS)]
    assert [b.name for b in opt.report.blocks] == names and [c.name for c in opt.certificate.blocks] == names
    assert all(c.passed and c.cases for c in opt.certificate.blocks) and opt.certificate.passed
    assert {r.block for r in opt.report.passes if r.fired and r.verified} == set(names)
    assert len({c.distance_rewritten for c in opt.certificate.blocks}) == LAYERS, "each has its own figures"
    x = rand(9, H, seed=11)
    with torch.no_grad():
        torch.testing.assert_close(opt(x), subject(x))


def test_every_layer_is_recorded_where_nothing_is_verified(recorded):
    _, times = optimized(model(), recorded, verify="off")
    assert times == [times[0]] * LAYERS and times[0] > 0


class Warmer(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.25


class OtherLinear(nn.Linear):
    pass


def in_other_class(layer):
    """A class of the same name with another forward."""
    own = type("Block", (Block,), {"route": lambda self, x: Block.route(self, x.tanh())})
    layer.__class__ = own


def parametrized(layer):
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    nn.utils.parametrize.register_parametrization(layer.router, "weight", Twice())


def patched(layer):
    original = layer.norm.forward
    layer.norm.forward = lambda x: original(x) * 2


def tied(layer):
    layer.experts[1][0].weight = layer.experts[0][0].weight


def viewed(layer):
    store = torch.randn(2, *layer.experts[0][0].weight.shape)
    for e in (0, 1):
        layer.experts[e][0].weight = nn.Parameter(store[e])


def turned(weight):
    return nn.Parameter(weight.detach().t().contiguous().t())


HIDDEN = {
    "a number": lambda layer: setattr(layer, "scale", 0.75),
    "the sign of a number": lambda layer: setattr(layer, "scale", -1.5),
    "a number of another type": lambda layer: setattr(layer, "top_k", 2.0),
    "a configuration's attribute": lambda layer: setattr(layer, "config", types.SimpleNamespace(top_k=3)),
    "an element of a list": lambda layer: layer.turns.__setitem__(1, 3.0),
    "a function": lambda layer: setattr(layer, "act", F.softplus),
    "a buffer": lambda layer: layer.offset.add_(0.5),
    "one bit of a buffer": lambda layer: layer.late.__setitem__(0, -0.0),
    "a buffer that is not saved": lambda layer: layer.late.__setitem__(1, 1.0),
    "a tensor that is no buffer": lambda layer: layer.plain.__setitem__(1, 2.0),
    "an epsilon": lambda layer: setattr(layer.norm, "eps", 1e-2),
    "a child's class": lambda layer: setattr(layer, "norm", Warmer(H)),
    "a child's class of the same code": lambda layer: setattr(layer.router, "__class__", OtherLinear),
    "the block's class": in_other_class,
    "an activation": lambda layer: layer.experts[2].__setitem__(1, nn.SiLU()),
    "a hook": lambda layer: layer.norm.register_forward_hook(lambda m, a, y: y * 2),
    "a hook before": lambda layer: layer.router.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "a patched forward": patched,
    "a parametrization": parametrized,
    "the mode of a child": lambda layer: layer.norm.train(),
    "a parameter's dtype": lambda layer: layer.norm.half(),
    "a parameter of ones": lambda layer: nn.init.ones_(layer.shift),
    "a missing bias": lambda layer: setattr(layer.experts[1][0], "bias", None),
    "a frozen parameter": lambda layer: layer.router.weight.requires_grad_(False),
    "a shared parameter": tied,
    "parameters in one store": viewed,
    "strides": lambda layer: setattr(layer.router, "weight", turned(layer.router.weight)),
    "one more attribute": lambda layer: setattr(layer, "extra", 1),
    "one more submodule": lambda layer: setattr(layer, "extra", nn.Identity()),
    "an object": lambda layer: setattr(layer, "extra", object()),
}


@pytest.mark.parametrize("what", HIDDEN)
def test_whatever_one_layer_hides_is_seen(what):
    subject = model()
    first, second, third = subject.layers[:3]
    assert unlike(first, second) == "" and unlike(second, first) == ""
    HIDDEN[what](second)
    assert unlike(first, second) != "" and unlike(second, first) != "", what
    assert unlike(first, third) == "", "the others are alike as before"


SHOWN = ["a number", "a configuration's attribute", "a function", "a buffer", "an epsilon", "a hook", "an activation",
         "the block's class", "a parametrization", "a parameter of ones", "a tensor that is no buffer"]  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("what", SHOWN)
def test_a_layer_that_hides_something_takes_the_full_way_and_keeps_what_it_computes(what, recorded):
    subject = model()
    HIDDEN[what](subject.layers[2])
    opt, times = optimized(subject, recorded, verify="fast")
    assert times[1] == times[3] == 0 and times[0] > 0 and times[2] > 0
    x = rand(9, H, seed=11)
    with torch.no_grad():
        torch.testing.assert_close(opt(x), subject(x))
    assert opt.certificate.passed


def test_a_proposal_that_is_not_equivalent_takes_the_full_way(recorded, monkeypatch):
    """Sabotage: what makes a layer unlike is not seen. Verification sees it."""
    monkeypatch.setattr(alike_blocks, "unlike", lambda *modules: "")
    monkeypatch.setattr(module_guard.Watch, "paused", True)
    subject = model()
    subject.layers[1].scale = 0.75
    subject.layers[2].offset.add_(0.5)  # a buffer is read live: the bound graph is right here
    opt, times = optimized(subject, recorded)
    assert times[1] > 0 and times[2] == 0
    x = rand(9, H, seed=11)
    with torch.no_grad():
        torch.testing.assert_close(opt(x), subject(x))
    assert opt.certificate.passed and [b.status for b in opt.report.blocks] == ["rewritten"] * LAYERS


def test_what_a_rewritten_block_watches_is_as_it_was_or_nothing_is_proposed(recorded, monkeypatch):
    """Sabotage: what makes a layer unlike is not seen. The guards of the rewritten block see it."""
    monkeypatch.setattr(alike_blocks, "unlike", lambda *modules: "")
    subject = model()
    subject.layers[3].turns[1] = 3.0
    _, times = optimized(subject, recorded)
    assert times[3] > 0 and times[2] == 0


def test_alike_blocks_watch_their_own_modules():
    opt = moeopt.optimize(model(), rand(24, H, seed=7))
    x = rand(9, H, seed=11)
    opt.model.layers[2].scale = 3.0
    with pytest.warns(moeopt.errors.StaleModelWarning, match="scale of the block is 3.0 and was 1.5"):
        opt(x)
    assert [layer.forward.fallbacks for layer in opt.model.layers] == [0, 0, 1, 0]

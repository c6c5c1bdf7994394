"""What a block's own code reads of a router that it calls: a change there is told, and the original answers."""

import copy
import pickle
import re
import types

import pytest
import torch
from torch import nn

from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, E, H, X, build, close, far, optimized


class Router(nn.Module):
    FACTOR = 1.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, E)
        self.scale, self.chosen, self.config = 1.0, 2, types.SimpleNamespace(rest=1.0)

    @property
    def twice(self):
        return 2 * self.scale

    def scaled(self, y):
        return y * self.scale

    def forward(self, x):
        self.seen = (x.mean(), len(x))  # the block's own attribute of this name is another
        return self.linear(x).softmax(-1)


READ = {
    "an attribute": (lambda b, y: y * b.gate.scale, lambda gate: setattr(gate, "scale", 3.0), "gate.scale"),
    "of its class": (lambda b, y: y * b.gate.FACTOR, lambda gate: setattr(type(gate), "FACTOR", 3.0), "Router.FACTOR"),
    "a property": (lambda b, y: y * b.gate.twice, lambda gate: setattr(gate, "scale", 3.0), "gate.scale"),
    "a method": (lambda b, y: b.gate.scaled(y), lambda gate: setattr(gate, "scale", 3.0), "gate.scale"),
    "a configuration": (
        lambda b, y: y * b.gate.config.rest, lambda gate: setattr(gate.config, "rest", 3.0), "gate.config.rest",
    ),
    "of a module in it": (
        lambda b, y: y * b.gate.linear.out_features, lambda gate: setattr(gate.linear, "out_features", 9),
        "gate.linear.out_features",
    ),
    "an attribute that was absent": (
        lambda b, y: y * getattr(b.gate, "extra", 1.0), lambda gate: setattr(gate, "extra", 3.0), "gate.extra",
    ),
    "whether it has a bias": (
        lambda b, y: y * (1.0 + (b.gate.linear.bias is None)), lambda gate: setattr(gate.linear, "bias", None),
        "gate.linear.bias",
    ),
    "its mode": (lambda b, y: y * (1.0 + b.gate.training), lambda gate: gate.train(), "training of gate"),
}  # fmt: skip


def as_it_is(block, y):
    return y


class Reads(Block):
    def __init__(self, read=as_it_is):
        super().__init__()
        self.gate, self.read, self.seen = Router(), read, 1.0

    def route(self, x):
        w, ids = self.gate(x).topk(2)
        return ids, w

    def forward(self, x):
        return self.read(self, super().forward(x)) * self.seen


@pytest.fixture(autouse=True)
def class_as_it_was():
    yield
    Router.FACTOR = 1.0


@pytest.mark.parametrize("name", READ)
def test_a_change_of_what_is_read_of_the_router_is_told(name):
    read, change, place = READ[name]
    model = build(Reads, read=read)
    fast = optimized(model).model
    before = fast(X)
    change(fast.gate)
    if not name.startswith("of its class"):
        change(model.gate)
    with pytest.warns(StaleModelWarning, match=re.escape(place)):
        got = fast(X)
    close(got, model(X))
    assert far(got, before) and fast.forward.fallbacks == 1


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_whose_router_is_changed_before_its_first_call_tells_it(twin):
    model = build(Scaled)
    fast = twin(optimized(model).model)
    fast.gate.scale = model.gate.scale = 3.0
    with pytest.warns(StaleModelWarning, match=r"gate\.scale"):
        close(fast(X), model(X))


class Scaled(Reads):
    def forward(self, x):
        return super().forward(x) * self.gate.scale


def test_the_source_s_router_too():
    model = build(Scaled)
    fast = optimized(model)
    model.gate.scale = 3.0
    with pytest.warns(StaleModelWarning, match=r"gate\.scale of the model itself"):
        fast(X)


class Cast(Block):
    """The usual cast to the router's dtype."""

    def route(self, x):
        w, ids = self.gate(x.to(self.gate.weight.dtype)).softmax(-1, dtype=torch.float32).topk(2)
        return ids, w


class CastToAny(Block):
    def route(self, x):
        w, ids = self.gate(x.to(next(self.gate.parameters()).dtype)).softmax(-1, dtype=torch.float32).topk(2)
        return ids, w


@pytest.mark.parametrize("cls", [Cast, CastToAny])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_cast_to_the_dtype_that_the_router_has_now(cls, dtype):
    model = build(cls)
    fast = optimized(model).model
    fast(X)
    for one in (fast, model):
        one.gate.to(dtype)
    with pytest.warns(StaleModelWarning, match=r"gate\.weight\.dtype"):
        close(fast(X), model(X))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.gate, "unread", 3.0),
        lambda m: setattr(m.gate, "chosen", 3),
        lambda m: setattr(m, "gate", nn.Sequential(nn.Linear(H, E), nn.Softmax(-1))),
        lambda m: nn.init.ones_(m.gate.linear.weight),
    ],
    ids=["new", "named by nobody", "replaced", "written"],
)
def test_what_only_the_router_reads_is_followed(change):
    fast, own = optimized(build(Reads)).model, build(Reads)
    fast(X)
    for one in (fast, own):
        torch.manual_seed(1)
        change(one)
    close(fast(X), own(X))
    assert not fast.forward.fallbacks


def test_what_the_router_writes_is_no_change():
    fast = optimized(build(Reads)).model
    for count in (3, 5, 3):
        fast(X[:, :count])
    assert not fast.forward.fallbacks and fast.gate.seen[1] == 6

"""A shared copy has its own modules and the same tensors."""

import functools
import threading
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moeopt.capture.shared_copy import shared_copy
from moeopt.errors import UsageError
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded


def test_one_set_of_weights():
    model = seeded(MoE)
    model.register_buffer("load", torch.zeros(4))
    twin = shared_copy(model)
    assert twin is not model and twin.experts[0] is not model.experts[0] and type(twin) is MoE
    for (name, a), b in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert a is b, name
    assert twin.load is model.load
    twin.note = 1
    twin.experts[0].register_forward_hook(lambda *a: None)
    assert not hasattr(model, "note") and not model.experts[0]._forward_hooks
    x = rand(5, H)
    assert torch.equal(twin(x), model(x))


class Locked(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("holds a file")


def test_what_cannot_be_copied():
    with pytest.raises(
        UsageError, match=r"Locked cannot be copied \(TypeError: holds a file\), and moeopt works on a copy that"
    ):
        shared_copy(Locked(2, 2))


def closure(model):
    inner = model.router
    return lambda x: inner(x)


@pytest.mark.parametrize(
    "patch",
    [
        closure,
        lambda m: functools.partial(lambda x, f=None: f(x), f=closure(m)),
    ],
)
def test_a_patch_that_holds_on_to_the_original(patch):
    model = seeded(MoE)
    model.experts[1].forward = patch(model)
    text = "forward of experts.1 was replaced by a function that holds on to the original module, so a copy would silently run"  # noqa: E501
    with pytest.raises(UsageError, match=text):
        shared_copy(model)


def test_a_bound_method_is_copied_with_its_module():
    model = seeded(MoE)
    model.experts[1].forward = types.MethodType(
        lambda self, x: self[0](x).relu() @ self[2].weight.t(), model.experts[1]
    )
    twin = shared_copy(model)
    assert twin.experts[1].forward.__self__ is twin.experts[1]
    bound = seeded(MoE)
    bound.experts[1].forward = functools.partial(lambda child, x: child(x), bound.router)
    twin = shared_copy(bound)
    assert twin.experts[1].forward.args[0] is twin.router
    free = seeded(MoE)
    free.experts[0].forward = lambda x: x * 2
    assert torch.equal(shared_copy(free).experts[0](rand(2, H)), rand(2, H) * 2)


class Dispatcher:
    """Holds what cannot be copied beside what must be."""

    def __init__(self, router):
        self.lock, self.router, self.slots = threading.Lock(), router, [1, 2]


def test_what_cannot_be_copied_is_shared_and_told(tmp_path):
    model = seeded(MoE)
    model.lock, model.groups = threading.Lock(), {"data": [threading.Lock(), 3]}
    model.experts[1].dispatcher = Dispatcher(model.router)
    notes = []
    with open(tmp_path / "log", "w") as log:
        model.log = log
        twin = shared_copy(model, notes)
        assert twin.log is log
    assert twin.lock is model.lock and twin.groups["data"][0] is model.groups["data"][0]
    assert twin.groups is not model.groups and twin.groups["data"] is not model.groups["data"]
    inner = twin.experts[1].dispatcher
    assert inner is not model.experts[1].dispatcher and inner.lock is model.experts[1].dispatcher.lock
    assert inner.router is twin.router and inner.slots == [1, 2]  # the copy's own module, not the original's
    assert notes == [
        f"{path} ({kind}) cannot be copied: the optimised model shares it with the original"
        for path, kind in (
            ("lock", "lock"), ("groups['data'][0]", "lock"), ("log", "TextIOWrapper"),
            ("experts.1.dispatcher.lock", "lock"),
        )
    ]  # fmt: skip
    assert shared_copy(seeded(MoE), notes) is not None and len(notes) == 4


def test_a_weight_that_a_hook_computes_at_each_call_stops_no_copy():
    model = seeded(MoE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.experts[0][0])
    prune.l1_unstructured(model.experts[1][0], "weight", 0.5)
    x, notes = rand(5, H), []
    want = model(x)
    twin = shared_copy(model, notes)
    assert torch.equal(twin(x), want) and notes == []
    assert twin.experts[0][0].weight_v is model.experts[0][0].weight_v
    with torch.no_grad():
        model.experts[0][0].weight_g.mul_(2.0)
    assert torch.equal(twin(x), model(x)) and not torch.equal(twin(x), want)


class Grows:
    """As a module does that imports others when a copy is tried."""

    def __init__(self):
        self.found = {"lock": threading.Lock(), "more": [Joins(self)]}


class Joins:
    def __init__(self, home):
        self.home = home

    def __deepcopy__(self, memo):
        self.home.found[f"at {len(self.home.found)}"] = 1
        raise TypeError("is no value")


def test_a_container_that_grows_while_it_is_copied():
    model = seeded(MoE)
    model.registry = Grows()
    notes = []
    assert torch.equal(shared_copy(model, notes)(rand(3, H)), model(rand(3, H)))
    assert notes[0].startswith("registry.found['lock'] (lock) cannot be copied"), notes

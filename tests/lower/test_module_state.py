"""What a layer may be told beside its arguments: values at the top of the modules in which its code is written."""

import contextvars
import functools
import sys
import threading
import types

import pytest
import torch
from torch import nn

from moeopt.lower import module_state as room
from moeopt.lower.module_state import module_state

NUMBER = 1
CURRENT = types.SimpleNamespace(layer=0)
TABLE = {"layer": 0, "of": CURRENT}
SEEN = types.SimpleNamespace(each=[1.0, 2.0])
LOG = [1]
TOLD = contextvars.ContextVar("TOLD", default=0)
THREAD = threading.local()
THREAD.layer = 0
TENSOR = torch.zeros(2)
state = types.ModuleType("state_of_a_model")
state.LAYER = 0


class Told:
    layer = 0


class Slotted:
    __slots__ = ("layer", "unset")

    def __init__(self):
        self.layer = 0


def closure():
    told = {0: 0}

    def get():
        return told

    return get


def with_default(told={"layer": 0}):  # noqa: B006
    return told


OBJECT, SLOTTED, CLOSURE, PARTIAL = Told(), Slotted(), closure(), functools.partial(closure(), 1)
NESTED = {"a": [types.SimpleNamespace(b=types.SimpleNamespace(c=[{"layer": 0}]))]}
NESTED["itself"] = NESTED
OTHER_MODEL = nn.Module()
OTHER_MODEL.step = 0


class Layer(nn.Module):
    told = 0
    shared = types.SimpleNamespace(layer=0)

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.settings = {"config": self.shared, "own": [1]}


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(sys.modules[__name__], "NUMBER", 2),
        lambda patch: patch.setattr(sys.modules[__name__], "TENSOR", torch.zeros(2)),
        lambda patch: patch.setattr(CURRENT, "layer", 1),
        lambda patch: patch.setattr(CURRENT, "layer", False),
        lambda patch: patch.setattr(OBJECT, "layer", 1),
        lambda patch: patch.setattr(state, "LAYER", 1),
        lambda patch: patch.setattr(THREAD, "layer", 1),
        lambda patch: patch.setitem(TABLE, "layer", 1),
        lambda patch: patch.setattr(SEEN, "each", [1.0]),
        lambda patch: patch.setattr(SLOTTED, "layer", 1),
        lambda patch: patch.setitem(NESTED["a"][0].b.c[0], "layer", 1),
        lambda patch: patch.setitem(CLOSURE.__closure__[0].cell_contents, 0, 1),
        lambda patch: patch.setitem(PARTIAL.func.__closure__[0].cell_contents, 0, 1),
        lambda patch: patch.setitem(with_default.__defaults__[0], "layer", 1),
        lambda patch: patch.setattr(closure, "layer", 1, raising=False),
        lambda patch: patch.setattr(Layer, "told", 1),
        lambda patch: patch.setattr(Layer.shared, "layer", 1),
        lambda patch: patch.setattr(OTHER_MODEL, "step", 1),
    ],
)
def test_a_change_is_seen_and_its_taking_back(change):
    before = module_state(Layer())
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        assert before != module_state(Layer())
    assert before == module_state(Layer())


def test_the_value_of_a_context_variable_is_seen():
    before = module_state(Layer())
    token = TOLD.set(1)
    assert before != module_state(Layer())
    TOLD.reset(token)
    assert before == module_state(Layer())


def test_a_list_that_grows_is_a_log_and_one_whose_item_is_replaced_is_not():
    before = module_state(Layer())
    LOG.append(2)
    try:
        assert before == module_state(Layer())
        LOG[0] = 3
        assert before != module_state(Layer())
    finally:
        LOG[:] = [1]
    assert before == module_state(Layer())


def test_what_belongs_to_pytorch_is_not_looked_at():
    assert module_state(nn.Linear(2, 2)) == []


def test_code_that_can_reach_more_than_can_be_looked_at_has_a_state_that_is_never_the_same(monkeypatch):
    monkeypatch.setattr(room, "MOST_OBJECTS", 3)
    assert module_state(Layer()) != module_state(Layer())

"""Whatever a forward changes in its module is seen, and undone."""

import pytest
import torch
from torch import nn

from moeopt.capture.module_state import ModuleState
from moeopt.errors import UsageError


class Odd:
    def __eq__(self, other):
        raise RuntimeError("these cannot be compared")

    __hash__ = object.__hash__


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("load", torch.zeros(3))
        self.count, self.seen, self.last, self.names = 0, [1], {"a": (1, 2)}, {"x"}
        self.odd, self.none = Odd(), None


def test_nothing_changed_is_nothing_to_report():
    model = Model()
    state = ModuleState(model)
    model.last = {"a": (1, 2)}  # another dict with the same content
    model.seen = [1, 2]  # another list with other content
    assert state.changed_attributes() == {("", "seen"): [1, 2]} and state.changed_in_place() == set()


def test_every_change_is_reported_and_undone():
    model = Model()
    weight, load, odd = model.inner.weight, model.load, model.odd
    state = ModuleState(model)
    model.count += 1
    model.seen.append(2)
    model.last["b"] = torch.ones(1)
    model.names.add("y")
    model.aux = torch.ones(2)
    model.inner.scale = 3
    model.odd = Odd()
    model.load = torch.ones(3)
    model.inner.weight = nn.Parameter(torch.zeros(2, 2))
    changed = state.changed_attributes()
    assert set(changed) == {
        ("", "count"), ("", "seen"), ("", "last"), ("", "names"), ("", "aux"), ("", "odd"), ("", "load"),
        ("inner", "scale"), ("inner", "weight"),
    }  # fmt: skip
    assert (
        changed["", "count"] == 1 and changed["", "seen"] == [1, 2] and torch.equal(changed["", "aux"], torch.ones(2))
    )
    assert state.changed_in_place() == {("", "seen"), ("", "last"), ("", "names")}
    state.restore()
    assert (model.count, model.seen, model.last, model.names) == (0, [1], {"a": (1, 2)}, {"x"})
    assert not hasattr(model, "aux") and not hasattr(model.inner, "scale") and model.odd is odd
    assert state.changed_attributes() == {}
    # replaced tensors come back as the objects that they were
    assert model.load is load and model.inner.weight is weight


def test_lists_and_dicts_keep_their_identity():
    model = Model()
    seen, state = model.seen, ModuleState(model)
    seen += [5, 6]
    state.restore()
    assert model.seen is seen and seen == [1]


def test_a_write_that_was_announced_is_undone():
    model = Model()
    state = ModuleState(model)
    row = model.inner.weight.detach()[0]  # a view of a Parameter
    before = model.inner.weight.detach().clone()
    state.about_to_write(row)
    row.zero_()
    state.about_to_write(row)  # only the first announcement saves
    state.about_to_write(torch.zeros(3))  # memory of nobody's
    state.restore()
    assert torch.equal(model.inner.weight, before)


def test_a_lazy_module_must_have_run_once():
    with pytest.raises(
        UsageError,
        match=r"0.weight has no shape yet \(a lazy module\); run the model once on these inputs, then optimise",
    ):
        ModuleState(nn.Sequential(nn.LazyLinear(3)))

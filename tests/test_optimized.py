"""What ``moeopt.optimize`` returns stands in for its model: attributes are the model's, read, set or deleted."""

import copy
import pickle

import pytest
import torch

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import X, build


@pytest.fixture
def opt():
    return moeopt.optimize(build(), X, verify="off")


def test_a_module_that_is_set_is_what_runs(opt):
    doubled = copy.deepcopy(opt.model.experts)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    opt.experts = doubled
    assert opt.model.experts is doubled is opt.experts
    changed = build()
    changed.experts = doubled
    with pytest.warns(StaleModelWarning, match="a module in the block was replaced"):
        assert torch.equal(opt(X), changed(X))


def test_other_attributes_are_the_model_s_too(opt):
    opt.note = 3
    assert opt.note == opt.model.note == 3
    del opt.note
    assert not hasattr(opt, "note") and not hasattr(opt.model, "note")
    opt.training = True
    assert opt.model.training


@pytest.mark.parametrize("name", ["model", "report", "certificate", "save"])
def test_what_it_has_itself_is_its_own(opt, name):
    before, other = getattr(opt.model, name, None), object()
    setattr(opt, name, other)
    assert vars(opt)[name] is other
    if name != "model":
        assert getattr(opt.model, name, None) is before


def test_copies_and_pickles_have_their_own(opt):
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        other.note = 1
        assert other.model.note == 1 and not hasattr(opt, "note")

"""A call that is refused after the router ran leaves what the router wrote once, not twice."""

import collections
import copy
import pickle

import pytest
import torch
from torch import nn

from moeopt.errors import StaleModelWarning
from moeopt.rewrite.kept_effects import just_run
from tests.toy_moe import Block, E, H, build, close, optimized, seeded

X = seeded(2, 8, H)


class Router(nn.Module):
    """Weights that depend on the calls before."""

    def __init__(self):
        super().__init__()
        self.linear, self.chosen = nn.Linear(H, E, bias=False), 2
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        w, ids = self.linear(x).softmax(-1).topk(self.chosen)
        self.count(w, ids)
        return ids, w * (1 + self.state())

    def count(self, w, ids):
        self.steps += 1

    def state(self):
        return self.steps * 0.1


class Normed(Router):
    """Its running statistics are written by an op that does not say so."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(E)

    def count(self, w, ids):
        self.norm.train()(self.linear.weight.T)

    def state(self):
        return self.norm.running_mean.mean() + self.norm.running_var.mean()


class Assigned(Router):
    """A new tensor in an attribute, absent at first, and a new buffer in the place of another."""

    def count(self, w, ids):
        self.mean = w.mean() + getattr(self, "mean", 0)
        self.steps = self.steps + 1

    def state(self):
        return self.mean * self.steps


class Listed(Router):
    """Containers that its forward writes into."""

    def __init__(self):
        super().__init__()
        self.means, self.seen = [torch.zeros(())], collections.Counter(calls=0)

    def count(self, w, ids):
        self.means.append(w.mean())
        self.seen["calls"] += 1

    def state(self):
        return torch.stack(self.means).sum()


class Counting(Block):
    def __init__(self, router=Router):
        super().__init__()
        self.gate = router()

    def route(self, x):
        return self.gate(x)


def another_expert(model):
    model.experts[1].act = nn.ReLU()


def more_experts(model):
    model.gate.chosen = 3


def a_hook(model):
    model.experts[2].register_forward_hook(lambda module, args, out: 2 * out)


def held(model):
    """What the router has written, as plain values."""
    gate = model.gate
    tensors = [*gate.buffers(), *getattr(gate, "means", ()), getattr(gate, "mean", torch.zeros(()))]
    return [t.tolist() for t in tensors], getattr(gate, "seen", None)


@pytest.mark.parametrize("router", [Router, Normed, Assigned, Listed])
@pytest.mark.parametrize("change", [another_expert, more_experts, a_hook])
def test_what_the_router_wrote_is_put_back_before_the_own_code_runs(router, change):
    model = build(Counting, router=router)
    fast, own = optimized(model).model, copy.deepcopy(model)
    close(fast(X), own(X))
    for one in (fast, own):
        change(one)
    with pytest.warns(StaleModelWarning):
        close(fast(X), own(X))
    assert held(fast) == held(own) and held(own) != held(build(Counting, router=router))
    close(fast(X), own(X))
    assert held(fast) == held(own)


def test_an_attribute_that_the_refused_call_made_is_taken_away():
    model = build(Counting, router=Assigned)
    fast, own = optimized(model).model, copy.deepcopy(model)
    for one in (fast, own):
        another_expert(one)
    assert not hasattr(fast.gate, "mean")
    with pytest.warns(StaleModelWarning, match=r"experts.1"):
        close(fast(X), own(X))
    assert held(fast) == held(own)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_put_it_back_in_their_own_router(twin):
    model = build(Counting)
    first, own = optimized(model).model, copy.deepcopy(model)
    other = twin(first)
    for one in (other, own):
        another_expert(one)
    with pytest.warns(StaleModelWarning):
        close(other(X), own(X))
    assert other.gate.steps == 1 and first.gate.steps == 0


def test_a_router_that_was_replaced_is_left_alone():
    model = build(Counting)
    fast = optimized(model).model
    for one in (fast, model):
        torch.manual_seed(3)
        one.gate = Listed()
        another_expert(one)
    with pytest.warns(StaleModelWarning):
        fast(X)
    assert fast.gate.steps == 0


def test_nothing_is_noted_for_modules_that_write_nothing():
    assert optimized(build()).model.forward._undoing is just_run

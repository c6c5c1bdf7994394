"""A call that is refused after the router ran is given the router's result: what that writes, or hooks see, is once."""

import collections
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from moeopt.errors import StaleModelWarning
from moeopt.rewrite.kept_effects import replayed_results, run_unrecorded
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
def test_what_the_router_writes_is_written_once(router, change):
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


def test_an_attribute_that_the_refused_call_made_is_the_only_one():
    model = build(Counting, router=Assigned)
    fast, own = optimized(model).model, copy.deepcopy(model)
    for one in (fast, own):
        another_expert(one)
    assert not hasattr(fast.gate, "mean")
    with pytest.warns(StaleModelWarning, match=r"experts.1"):
        close(fast(X), own(X))
    assert held(fast) == held(own)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_what_their_own_router_gave(twin):
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


class Plain(Counting):
    """Its router writes nothing."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)

    def route(self, x):
        w, ids = self.gate(x).softmax(-1).topk(self.top_k)
        return ids, w


def by_a_hook(gate, seen):
    gate.register_forward_hook(lambda module, args, out: seen.append(out))


def by_a_hook_before(gate, seen):
    gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def by_a_hook_before_that_changes_the_rows(gate, seen):
    gate.register_forward_pre_hook(lambda module, args: (seen.append(args[0]), args[0] * 2)[1:])


def by_a_hook_with_another_result(gate, seen):
    gate.register_forward_hook(lambda module, args, out: (seen.append(out), out * -1)[1])


def by_a_forward(gate, seen):
    own = gate.forward
    gate.forward = lambda x: (seen.append(own(x)), seen[-1])[1]


@pytest.mark.parametrize(
    "see",
    [by_a_hook, by_a_hook_before, by_a_hook_before_that_changes_the_rows, by_a_hook_with_another_result, by_a_forward],
)
@pytest.mark.parametrize("early", [True, False], ids=["before", "after a call"])
def test_who_watches_the_router_sees_a_refused_call_once(see, early):
    fast, own = optimized(build(Plain)).model, build(Plain)
    seen = {one: [] for one in (fast, own)}
    if not early:
        fast(X)
    for one, calls in seen.items():
        see(one.gate, calls)
        another_expert(one)
    with pytest.warns(StaleModelWarning, match="experts.1"):
        got = fast(X)
    close(got, own(X))
    assert len(seen[fast]) == 1 and fast.forward.fallbacks == 1
    close(fast(X), own(X))
    assert len(seen[fast]) == 2
    for one, calls in zip(seen[fast], seen[own], strict=True):
        assert torch.equal(one, calls)


def test_each_call_of_a_router_that_is_called_twice_is_given_its_own_result():
    class Twice(Counting):
        def route(self, x):
            ids, w = self.gate(x)
            return ids, w + self.gate(x * 2)[1]

    fast, own = optimized(build(Twice)).model, build(Twice)
    for one in (fast, own):
        another_expert(one)
    with pytest.warns(StaleModelWarning):
        close(fast(X), own(X))
    assert held(fast) == held(own) and fast.gate.steps == 2


def test_a_result_is_given_again_for_the_same_rows_only():
    gate = nn.Linear(H, E)
    x, y = seeded(3, H), seeded(3, H, seed=6)
    results = [(gate, (x,), torch.ones(3, E))]
    with replayed_results(results):
        close(gate(y), nn.functional.linear(y, gate.weight, gate.bias))
        assert torch.equal(gate(x.clone()), torch.ones(3, E))
        close(gate(x), nn.functional.linear(x, gate.weight, gate.bias))
    nothing = torch.full((3, H), torch.nan)
    with replayed_results([(gate, (nothing,), torch.ones(3, E))]):
        assert torch.equal(gate(nothing), torch.ones(3, E))


def test_gradients_reach_a_router_that_is_not_run_again():
    fast, own = optimized(build(Plain)).model, build(Plain)
    seen = []
    by_a_hook(fast.gate, seen)
    for one in (fast, own):
        another_expert(one)
    with pytest.warns(StaleModelWarning):
        fast(X).sum().backward()
    own(X).sum().backward()
    assert len(seen) == 1
    close(fast.gate.weight.grad, own.gate.weight.grad)


def test_backward_hooks_of_the_router_fire():
    fast, fired = optimized(build(Plain)).model, []
    fast.gate.register_full_backward_hook(lambda module, grads, out: fired.append(1))
    another_expert(fast)
    with pytest.warns(StaleModelWarning):
        fast(X).sum().backward()
    assert fired


def test_another_thread_is_not_given_what_this_one_has():
    """A second thread calls the router itself while a refused call runs in the first."""
    fast, own = optimized(build(Counting)).model, build(Counting)
    another_expert(fast)
    other = seeded(5, H, seed=9)
    results = []

    def meanwhile(module, args, out):
        thread = threading.Thread(target=lambda: results.append(fast.gate(other)[1]))
        thread.start()
        thread.join()

    fast.experts[0].act.register_forward_hook(meanwhile)
    with pytest.warns(StaleModelWarning):
        fast(X)
    own.gate(X.reshape(-1, H))
    close(results[0], own.gate(other)[1])


def test_nothing_is_noted_where_nobody_watches():
    fast = optimized(build(Plain)).model
    fast(X)
    assert not fast.gate._forward_hooks and fast.forward._run_recorded._idle()
    fast.gate.register_forward_hook(lambda *args: None)
    assert not fast.forward._run_recorded._idle()
    fast(X)
    assert len(fast.gate._forward_hooks) == 1


def test_a_block_without_modules_that_are_kept_notes_nothing():
    class Inline(Plain):
        def route(self, x):
            w, ids = torch.nn.functional.linear(x, self.gate.weight).softmax(-1).topk(2)
            return ids, w

    assert optimized(build(Inline)).model.forward._run_recorded is run_unrecorded

"""A copy of a rewritten module is a module of its own: what is changed in it is not looked up in the other."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import moeopt.rewrite.install as install
from moeopt.errors import StaleModelWarning
from moeopt.rewrite.install import uninstall
from moeopt.rewrite.module_copies import REFERENCES
from tests.toy_moe import Block, E, H, X, build, close, far, optimized


def copied(model):
    """As ``copy.copy``, with a table of modules of its own."""
    twin = copy.copy(model)
    twin._modules = dict(twin._modules)
    return twin


def another_gate(model):
    torch.manual_seed(4)
    model.gate = nn.Linear(H, E)


def other_experts(model):
    torch.manual_seed(4)
    model.experts = Block().experts


CHANGES = {
    "a number": (lambda m: setattr(m, "top_k", 1), "top_k of the block is 1"),
    "a router": (another_gate, None),
    "experts": (other_experts, None),
    "an expert of another kind": (lambda m: m.experts[0].__setattr__("act", nn.ReLU()), "act|class|module"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("called", [False, True], ids=["before", "after a call"])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_a_shallow_copy_runs_what_it_holds(name, called, hooked):
    change, told = CHANGES[name]
    own = build()
    fast = optimized(build()).model
    if called:
        fast(X)
    twin, own_twin = copied(fast), copied(own)
    if hooked:
        for one in (twin, own_twin):
            one._forward_hooks = one._forward_hooks.copy()
            one.register_forward_hook(lambda module, args, out: 2 * out)
    before = own_twin(X)
    change(twin), change(own_twin)
    if told is None:
        got = twin(X)
    else:
        with pytest.warns(StaleModelWarning, match=told):
            got = twin(X)
    close(got, own_twin(X))
    if name != "an expert of another kind":  # which both share
        assert far(got, before)
        close(fast(X), own(X))
        assert not fast.forward.fallbacks
    assert twin.forward is not fast.forward and twin.forward.module is twin


def test_replicas_of_data_parallel_run_their_own_weights():
    fast = optimized(build()).model
    replica = fast._replicate_for_data_parallel()
    replica.gate = nn.Linear(H, E, bias=False)
    own = build()
    own.gate = replica.gate
    close(replica(X), own(X))
    close(fast(X), build()(X))


@pytest.mark.parametrize("grad", [True, False])
def test_only_a_forward_with_other_references_looks_who_calls(monkeypatch, grad):
    asked = []
    monkeypatch.setattr(install, "shallow_copy_of", lambda module: asked.append(module))
    fast = optimized(build())
    asked.clear()  # of trials
    with torch.set_grad_enabled(grad):
        fast(X), fast.model(X)
    assert not asked and install._REFERENCES == REFERENCES + 1
    twin = copy.copy(fast.model)
    fast(X), twin(X)
    assert asked == [fast.model, fast.model]


def test_a_call_of_the_forward_itself_is_the_module_s_own():
    fast = optimized(build()).model
    kept, twin = fast.forward, copied(fast)
    twin.top_k = 1
    close(kept(X), build()(X))


def of_a_graph():
    """A model with a rewritten block that is an fx.GraphModule."""

    class EveryExpert(Block):
        def forward(self, x):
            ids, w = self.route(x)
            table = (torch.nn.functional.one_hot(ids, E) * w[..., None]).sum(-2)
            return sum(table[..., e, None] * expert(x) for e, expert in enumerate(self.experts))

    torch.manual_seed(1)
    return fx.symbolic_trace(EveryExpert().eval())


@pytest.mark.parametrize("held", [False, True], ids=["itself", "in a model"])
def test_a_deep_copy_of_a_graph_module_runs_the_rewritten_code(held):
    own = of_a_graph()
    fast = optimized(nn.Sequential(own) if held else own).model
    twin = copy.deepcopy(fast)
    block = twin[0] if held else twin
    close(twin(X), own(X))
    assert (block.forward.calls, block.forward.fallbacks, block.forward.module) == (1, 0, block)
    with torch.no_grad():
        next(block.experts.parameters()).mul_(3)
    changed = twin(X)
    assert far(changed, own(X)) and not block.forward.fallbacks
    uninstall(block)
    close(changed, twin(X))
    assert "forward" not in copy.deepcopy(block).__dict__


@pytest.mark.parametrize("made", [
    lambda fast: copy.deepcopy(copy.copy(fast)),
    lambda fast: copy.deepcopy(nn.ModuleList([fast, copy.copy(fast)]))[1],
    lambda fast: copy.deepcopy(nn.ModuleList([copy.copy(fast), fast]))[0],
], ids=["alone", "behind the module", "before the module"])  # fmt: skip
def test_a_deep_copy_of_a_shallow_copy_of_a_graph_module_reads_its_own_parts(made):
    fast = optimized(of_a_graph()).model
    twin = made(fast)
    close(twin(X), fast(X))
    twin.gate = nn.Linear(H, E)
    close(twin(X), type(twin).forward(twin, X))
    assert far(twin(X), fast(X)) and twin.forward.module is twin


def test_a_rewritten_graph_module_says_why_it_cannot_be_pickled():
    with pytest.raises(pickle.PicklingError, match=r"an fx.GraphModule, whose class .*: save a bundle with"):
        pickle.dumps(optimized(of_a_graph()).model)


def test_a_deep_copy_of_a_graph_module_with_another_graph_runs_that():
    twin = copy.deepcopy(optimized(of_a_graph()).model)
    output = next(iter(reversed(twin.graph.nodes)))
    with twin.graph.inserting_before(output):
        output.args = (twin.graph.call_function(torch.neg, (output.args[0],)),)
    twin.recompile()
    with pytest.warns(StaleModelWarning, match="the class of the block, or its forward, is not the one"):
        close(twin(X), -of_a_graph()(X))

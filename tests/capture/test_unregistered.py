"""Experts that PyTorch does not see: found, named in the report, shared by the copy, and left as they are."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.unregistered import registered, unregistered
from tests.toy_moe import Block, E, Expert, H, X, build, close, seeded


class Plain(Block):
    """The experts as ``keep`` holds them."""

    keep = list

    def __init__(self):
        super().__init__()
        experts = list(self.experts)
        del self.experts
        self.__dict__["experts"] = type(self).keep(experts)


class InTuple(Plain):
    keep = tuple


class InNestedLists(Plain):
    @staticmethod
    def keep(experts):
        return [experts[:2], experts[2:]]

    def forward(self, x):
        kept, self.__dict__["experts"] = self.experts, [*self.experts[0], *self.experts[1]]
        try:
            return super().forward(x)
        finally:
            self.__dict__["experts"] = kept


class InDict(Block):
    def __init__(self):
        super().__init__()
        self.by_name = {f"expert.{e}": expert for e, expert in enumerate(self.experts)}
        del self.experts

    @property
    def experts(self):
        return self.by_name.values()


class Tensors(Block):
    def __init__(self):
        super().__init__()
        del self.experts
        self.w1, self.w2 = [seeded(H, H) for _ in range(E)], [seeded(H, H, seed=6) for _ in range(E)]

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, (x[token] @ self.w1[e]).relu() @ self.w2[e] * w[token, slot, None])
        return y


class Hidden(Block):
    """A module of experts that is put where PyTorch does not look."""

    def __init__(self):
        super().__init__()
        inner = Block()
        inner.eval()
        del self.experts, self.gate
        self.__dict__["inner"] = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("cls", "says", "way_out"),
    [
        (Plain, "a plain Python list (self.experts of Plain)", "an nn.ModuleList"),
        (InTuple, "a plain Python tuple (self.experts of InTuple)", "an nn.ModuleList"),
        (InNestedLists, "a plain Python list (self.experts of InNestedLists)", "an nn.ModuleList"),
        (InDict, "a plain Python dict (self.by_name of InDict)", "an nn.ModuleDict"),
        (Tensors, "a plain Python list (self.w1 of Tensors)", "an nn.ParameterList"),
        (Hidden, "a plain Python attribute (self.inner of Hidden)", "an attribute that is assigned"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_it_is_listed_with_the_reason(cls, says, way_out, alone):
    model = build(cls) if alone else nn.Sequential(nn.Linear(H, H), build(cls), build()).eval()
    fast = moeopt.optimize(model, X, verify="fast")
    block, *others = [b for b in fast.report.blocks if b.kind == "moe"]
    assert (block.status, block.experts) == ("declined", E) and block.name == (cls.__name__ if alone else "1")
    assert block.reason.startswith(f"its weights are in {says}, which .parameters(), .to(), .eval() and state_dict() ")
    assert block.reason.endswith(f"keep them in {way_out} and optimise again") or "(self.name = ...)" in block.reason
    assert [b.status for b in others] == ([] if alone else ["rewritten"])
    with torch.no_grad():
        close(fast(X), model(X))
    assert list(model.state_dict()) == list(fast.model.state_dict())


def test_a_dense_layer_of_a_plain_list_is_listed_too():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Expert().eval()]

        def forward(self, x):
            return self.layers[0](x)

    for how in ({"dense": "leave"}, {"dense": "fuse"}, {"dense": "split", "experts": 2}):
        (block,) = moeopt.explain(Stack().eval(), X, **how).blocks
        assert (block.kind, block.status) == ("dense_ffn", "declined") and "self.layers of Stack" in block.reason


def test_the_copy_shares_them():
    for cls in (Plain, InDict, Tensors, Hidden):
        model = build(cls)
        twin = shared_copy(model)
        ours, theirs = ([t for held in unregistered(m) for t in held.tensors] for m in (model, twin))
        assert ours and all(a is b for a, b in zip(ours, theirs, strict=True))


def test_what_is_registered_as_well_and_ways_back_up_are_none():
    model = nn.Sequential(build(), nn.Linear(H, H))
    model.order = list(model[0].experts)
    model[1].__dict__["parent"], model[1].back = model, [model]
    assert unregistered(model) == []
    child = model[1]
    assert unregistered(child) == []  # alone, too: it is a part of what it holds
    block = next(b for b in moeopt.explain(model.eval(), X).blocks if b.kind == "moe")
    assert block.status == "rewritten"


def test_registering_leaves_no_trace():
    model = build(Plain)
    before = [name for name, _ in model.named_modules()]
    with registered(model, unregistered(model)):
        assert len(list(model.named_modules())) > len(before)
    assert [name for name, _ in model.named_modules()] == before and len(list(model.parameters())) == 1


class Experts:
    """Adapters of experts in an object that is no module, as injected adapters keep them."""

    def __init__(self):
        self.held = {f"expert.{e}": (seeded(H, H), seeded(H, H, seed=6)) for e in range(E)}


class InAnObject(Block):
    def __init__(self):
        super().__init__()
        del self.experts
        self.core = Experts()

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, (first, last) in enumerate(self.core.held.values()):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, (x[token] @ first).relu() @ last * w[token, slot, None])
        return y


def test_experts_of_a_plain_object_are_named_and_what_it_holds_is_copied():
    """Its tensors may be state: a copy of the model has them for itself."""
    model = InAnObject().eval()
    (block,) = moeopt.explain(model, X, verify="fast").blocks
    assert block.status == "declined" and block.experts == E
    assert (
        "a plain Python object (self.core of InAnObject)" in block.reason and "an nn.Module of its own" in block.reason
    )
    assert shared_copy(model).core.held["expert.0"][0] is not model.core.held["expert.0"][0]

"""Attributes that are written before they are read are no state; those that anybody reads later are."""

import copy
import pickle

import pytest
import torch
from torch import nn

import moeopt
from tests.toy_moe import Block, E, H, X, build, close, optimized, seeded


class Planned(Block):
    """Notes to itself, in attributes: sizes as a list, the shape, a flag."""

    def plan(self, x, ids):
        self.order = ids.flatten().argsort(stable=True)
        self.sizes = torch.bincount(ids.flatten(), minlength=E).tolist()
        self.shape, self.planned = tuple(x.shape), True

    def loop(self, x, ids, w):
        self.plan(x, ids)
        rows = self.order // self.top_k
        parts = [e(p) for e, p in zip(self.experts, x[rows].split(self.sizes), strict=True)]
        y = torch.cat(parts) * w.flatten()[self.order, None]
        return torch.zeros(self.shape).index_add(0, rows, y)


class NotedBefore(Planned):
    def __init__(self):
        super().__init__()
        self.sizes, self.shape, self.planned = None, (), False


@pytest.mark.parametrize("cls", [Planned, NotedBefore])
@pytest.mark.parametrize("used", [False, True])
def test_notes_within_one_call_are_no_state(cls, used):
    model = build(cls)
    if used:
        model(seeded(1, 3, H))
    fast = optimized(model)
    with torch.no_grad():
        for x in (X, seeded(1, 1, H), seeded(1, 40, H)):
            close(fast(x), model(x))
        assert model.sizes and not hasattr(fast.model, "sizes") and not hasattr(fast.model, "shape")
        assert fast.model.order is not None  # a tensor is stored as before
        with pytest.warns(moeopt.errors.StaleModelWarning):
            fast.model(X[0, 0])  # another rank: the original code runs, and stores
        assert fast.model.sizes
        close(fast(X), model(X))
        assert not hasattr(fast.model, "sizes")
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            close(twin(X), model(X))


def test_a_bundle_of_such_a_block(tmp_path):
    model = build(Planned)
    optimized(model).save(tmp_path / "bundle")
    with torch.no_grad():
        close(moeopt.load(tmp_path / "bundle")(X), model(X))


class Counter(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2)


class Remembers(Planned):
    """Uses the sizes of the first call as long as there are any."""

    def plan(self, x, ids):
        if not hasattr(self, "sizes") or sum(self.sizes) != ids.numel():
            super().plan(x, ids)
        self.order = ids.flatten().argsort(stable=True)


class LooksBack(Planned):
    def plan(self, x, ids):
        grown = getattr(self, "shape", (0,))[0]
        super().plan(x, ids)
        self.order = self.order.flip(0).flip(0) if grown > 3 else self.order


@pytest.mark.parametrize("cls", [Counter, Remembers, LooksBack])
def test_what_a_later_call_reads_is_state(cls):
    (block,) = [b for b in moeopt.explain(build(cls), X, verify="fast").blocks if b.kind == "moe"]
    assert block.status == "declined"
    assert "changes the Python attribute" in block.reason or "differently on a second call" in block.reason


class Reader(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.moe, self.read = build(Planned), read

    def forward(self, x):
        y = self.moe(x)
        return y + self.read(self.moe)


@pytest.mark.parametrize(
    "read",
    [lambda m: max(m.sizes) / 100, lambda m: max(getattr(m, "sizes", [0])) / 100],
    ids=["plain", "with a default"],
)
def test_what_the_rest_of_the_model_reads_is_not_taken_away(read):
    model = Reader(read).eval()
    fast = moeopt.optimize(model, X, verify="fast")
    (block,) = [b for b in fast.report.blocks if b.kind == "moe"]
    assert (block.name, block.status) == ("moe", "declined")
    assert block.reason.startswith("its forward stores Python values (") and "that code outside reads" in block.reason
    assert block.reason.endswith("store a tensor, or return the value")
    with torch.no_grad():
        close(fast(X), model(X))

"""What a forward writes beside its own attributes: such a block is declined, and optimising leaves no trace."""

import collections
import functools
import types

import numpy as np
import pytest
import torch

import moeopt
from tests.toy_moe import Block, build, close, optimized, seeded

LOG, TOTALS, LAST = [], {"calls": 0}, {}
X = seeded(2, 6, 16)


class Tracker:
    def __init__(self):
        self.steps, self.rows = 0, []

    def update(self, ids):
        self.steps += 1
        self.rows.append(tuple(ids.shape))


class Writing(Block):
    """Each forward tells of itself: ``tell`` writes ``ids`` into what ``held`` is."""

    shared = 0

    def __init__(self, held, tell):
        super().__init__()
        self.held, self.tell = held(), tell

    def route(self, x):
        ids, w = super().route(x)
        self.tell(self, ids)
        return ids, w


def count(m):
    m.held.steps = m.held.steps + 1


def count_all(m, _):
    type(m).shared += 1


WRITES = {
    "held['load']": (lambda: {"load": []}, lambda m, ids: m.held["load"].append(ids), lambda m: len(m.held["load"])),
    "held['load']['n']": (
        lambda: {"load": {"n": 0}},
        lambda m, ids: m.held["load"].update(n=m.held["load"]["n"] + 1),
        lambda m: m.held["load"]["n"],
    ),
    "held.steps": (lambda: types.SimpleNamespace(steps=0), lambda m, ids: count(m), lambda m: m.held.steps),
    "held.rows": (Tracker, lambda m, ids: m.held.update(ids), lambda m: (m.held.steps, len(m.held.rows))),
    "held[0]": (lambda: ([],), lambda m, ids: m.held[0].append(1), lambda m: len(m.held[0])),
    "held['c']": (
        lambda: {"c": torch.zeros(4)},
        lambda m, ids: m.held["c"].add_(torch.bincount(ids.reshape(-1), minlength=4)),
        lambda m: m.held["c"].sum().item(),
    ),
    "held": (
        lambda: np.zeros(2),
        lambda m, ids: m.held.__setitem__(0, m.held[0] + ids.shape[0]),
        lambda m: m.held.tolist(),
    ),
    "the Python attribute held in place": (
        collections.Counter,
        lambda m, ids: m.held.update(["calls"]),
        lambda m: m.held["calls"],
    ),
    "LOG": (int, lambda m, ids: LOG.append(1), None),
    "LAST['ids']": (int, lambda m, ids: LAST.update(ids=ids), None),
}
COUNTS = {
    "TOTALS['calls']": lambda m, ids: TOTALS.update(calls=TOTALS["calls"] + 1),
    "Writing.shared": count_all,
}


@pytest.mark.parametrize("place", WRITES)
def test_a_block_that_writes_elsewhere_at_each_call_is_declined_and_goes_on_writing(place):
    held, tell, read = WRITES[place]
    model = build(functools.partial(Writing, held, tell))
    before = read(model) if read else None
    opt = moeopt.optimize(model, X, verify="fast")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined"
    assert "at each call" in block.reason or "contents of the Python attribute" in block.reason
    assert place.removeprefix("the Python attribute ").removesuffix(" in place") in block.reason, block.reason
    assert "digest" not in block.reason and "float32 (" not in block.reason
    if read:
        assert read(model) == before == read(opt.model), "optimising left a trace"
        opt(X)
        model(X)
        assert read(opt.model) == read(model) != before


@pytest.mark.parametrize("place", COUNTS)
def test_a_count_outside_the_model_is_told_and_left_out(place):
    model = build(functools.partial(Writing, int, COUNTS[place]))
    (note,) = [n for n in optimized(model, X).report.notes if place in n]
    assert note.startswith("the code of Writing changes ") and "at each call, and the rewritten code does not" in note


def test_a_table_that_is_filled_once_for_each_size_is_no_effect():
    def remember(m, ids):
        m.held.setdefault("sizes", {}).setdefault(len(ids), len(ids))

    model = build(functools.partial(Writing, lambda: {"sizes": {}}, remember))
    opt = optimized(model, X)
    assert model.held == {"sizes": {}}
    close(opt(seeded(3, 5, 16)), model(seeded(3, 5, 16)))


class Once(Block):
    """Takes its first input's scale into a Parameter at the first call, as data-dependent initialisation does."""

    def __init__(self):
        super().__init__()
        self.inner = Block()
        self.scale = torch.nn.Parameter(torch.ones(16))
        self.ready = False

    def forward(self, x):
        if not self.ready:
            self.scale.data.copy_(1 / (x.std((0, 1)) + 0.1))
            self.ready = True
        return self.inner(x * self.scale)


class Hooked(Block):
    """A hook that writes to a Parameter at the first call and takes itself away."""

    def __init__(self):
        super().__init__()
        self.inner = Block()
        self.handle = self.register_forward_pre_hook(halve)

    def forward(self, x):
        return self.inner(x)


def halve(module, args):
    module.handle.remove()
    del module.handle
    with torch.no_grad():
        module.inner.gate.weight.mul_(0.5)


@pytest.mark.parametrize("kind", [Once, Hooked])
def test_what_a_first_call_does_to_the_model_around_a_block_is_undone(kind):
    model = build(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opt = moeopt.optimize(model, X, verify="fast")
    assert [b.status for b in opt.report.blocks if b.name == "inner"] == ["rewritten"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not getattr(model, "ready", False) and len(model._forward_pre_hooks) == (kind is Hooked)

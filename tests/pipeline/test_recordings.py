"""How often modules are recorded: each call once, an outer module once for all blocks that lie in it."""

import collections
import sys

import pytest
import torch
from torch import nn

import moeopt
from moeopt.capture import tape
from moeopt.capture.replay import ancestors
from moeopt.errors import Declined
from moeopt.find import single_products
from moeopt.find.discover import discover
from moeopt.pipeline import attempts, run
from moeopt.pipeline.declined_calls import DeclinedCalls
from tests.capture.tiny import rand
from tests.pipeline.given_ids import LoopOverUnique, made
from tests.pipeline.given_ids import call as given_call
from tests.recognise.tiny import E, H, MoE, seeded
from tests.zoo.declined import ExpertChoice


@pytest.fixture
def recorded(monkeypatch):
    """[(class of the module, the module, its mode, what it was called with, whether values were kept)]."""
    assert run.discover, "whoever records is imported"
    calls = []

    def noted(module, args=(), kwargs=None, **options):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        key = tuple((str(t.shape), t.flatten().tolist()) if isinstance(t, torch.Tensor) else t for t in leaves)
        calls.append((type(module), id(module), module.training, str(key), options.get("keep_values", True)))
        return record(module, args, kwargs, **options)

    record = tape.record
    for name, user in list(sys.modules.items()):
        if name.startswith("moeopt.") and getattr(user, "record", None) is record:
            monkeypatch.setattr(user, "record", noted)
    return calls


def twice(calls):
    return [key for key, times in collections.Counter(calls).items() if times > 1]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_block_is_recorded_in_three_calls_and_once_in_its_other_mode(backend, recorded):
    """A fifth recording, without values, is that of the model, where blocks are looked for."""
    model = nn.Sequential(nn.Linear(H, H), seeded(MoE)).eval()
    assert moeopt.optimize(model, rand(24, H), backend=backend, verify="off").report.blocks[0].status == "rewritten"
    training = [call[2] for call in recorded]
    assert len(recorded) == 5 and sum(training) == 1 and not twice(recorded)
    assert sum(call[4] for call in recorded) == 3, "only these keep values"


def test_no_probe_of_ids_is_recorded_twice(recorded):
    assert moeopt.optimize(made(LoopOverUnique), given_call()).report.blocks[0].status == "rewritten"
    repeated = twice(recorded)
    assert len(repeated) <= 1, "the first probe, which shows that the call can be repeated, and no other"


class Flattened(MoE):
    def forward(self, x):
        return super().forward(x.reshape(-1, H)).view_as(x)


class ReadsIds(MoE):
    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in range(E):
            if bool((ids == e).sum().item()):
                t, k = torch.where(ids == e)
                y.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        return y


class Tower(nn.Module):
    """Layers of which none can be rewritten, so that the tower around them is tried."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_module_around_many_declined_blocks_is_tried_once(recorded):
    tower = seeded(lambda: Tower([ExpertChoice() for _ in range(3)]))
    report = moeopt.explain(tower, rand(2, 8, 16))
    assert [b.status for b in report.blocks] == ["declined"] * 3
    assert all("expert" in b.reason and "choice" in b.reason for b in report.blocks), "each has its own reason"
    assert [call[0] for call in recorded].count(Tower) == 2, "where blocks are looked for, and where it is tried"
    assert not twice(recorded)


class Branching(Flattened):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if float(y.detach().mean()) > 0 else y


def test_a_cause_inside_a_block_stands_whatever_is_rewritten_beside_it(monkeypatch):
    tried, attempt = [], attempts.rewrite_block
    monkeypatch.setattr(attempts, "rewrite_block", lambda name, *rest: tried.append(name) or attempt(name, *rest))
    tower = seeded(lambda: Tower([Flattened(), Branching(), Flattened(), Branching()]))
    report = moeopt.optimize(tower, rand(24, H).view(2, 12, H), verify="off").report
    assert [b.status for b in report.blocks] == ["rewritten", "declined"] * 2
    assert all("may branch on it" in b.reason for b in report.declined)
    assert tried.count("Tower") == 1, "not once for each of them"


def test_what_is_remembered_holds_until_something_is_rewritten():
    rewrites, call = {}, object()
    declined = DeclinedCalls(rewrites)
    with pytest.raises(Declined, match="the first time"), declined.remembered(call):
        raise Declined("the first time", "a.py:3", others=())
    with pytest.raises(Declined, match="the first time") as caught, declined.remembered(call):
        raise AssertionError("tried again")
    assert caught.value.where == "a.py:3" and caught.value.__context__ is None
    with declined.remembered(object()):
        pass
    rewrites["a block"] = None
    with pytest.raises(Declined, match="the first time"), declined.remembered(call, caused_inside=True):
        raise AssertionError("tried again")
    with declined.remembered(call):
        pass


def test_the_choices_behind_numbers_are_searched_once_for_all_numbers(monkeypatch):
    """A loop over experts reads a number for each expert and layer: one search each grew with the square of layers."""
    searched = []
    monkeypatch.setattr(single_products, "ancestors", lambda nodes, *more: searched.append(nodes) or ancestors(nodes))
    tower = seeded(lambda: Tower([ReadsIds() for _ in range(4)]))
    assert len(discover(tower, (rand(24, H),), {})) == 4
    assert len(searched) <= 4, "none for each number, of which there are more"

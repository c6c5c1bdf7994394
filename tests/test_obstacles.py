"""Which of the obstacles that were met is the reason that the report shows."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import moeopt
from moeopt.obstacles import Obstacle, Rank, Stage, decisive, distinct
from moeopt.pipeline import block as pipeline_block
from moeopt.report import Report
from tests.toy_moe import Block, E, H, X, build
from tests.zoo import CASES

PROBE = Obstacle("no probe reached expert 3", rank=Rank.PROBE, stage=Stage.EXPERTS)
LATE = Obstacle("no tensor holds the ids", rank=Rank.READING, stage=Stage.ROUTING)
EARLY = Obstacle("the rows are of no one tensor", rank=Rank.READING, stage=Stage.EXPERTS)
NAMED = Obstacle("its experts differ", rank=Rank.FOUND, stage=Stage.FUNCTION)
RANDOM = Obstacle("it is random", rank=Rank.FORBIDS, stage=Stage.REWRITE)
BUG = Obstacle("moeopt itself failed", rank=Rank.INTERNAL, stage=Stage.REWRITE)


@pytest.mark.parametrize(
    ("levels", "first"),
    [
        ([[PROBE], [RANDOM]], RANDOM),  # the inner module is only not understood; the outer one is random
        ([[LATE, NAMED], [RANDOM]], NAMED),  # what is inside is true of everything around it
        ([[NAMED, RANDOM]], RANDOM),
        ([[EARLY], [LATE], [PROBE]], LATE),
        ([[LATE], [dataclasses.replace(LATE, module="outer")]], LATE),
        ([[BUG], [PROBE]], PROBE),
        ([[BUG]], BUG),
        ([[], []], None),
    ],
)
def test_the_one_that_decides(levels, first):
    assert decisive(levels) is first


def test_each_reason_is_kept_once_and_the_first_time():
    again = dataclasses.replace(LATE, module="outer")
    assert distinct([LATE, NAMED, again]) == (LATE, NAMED)


def test_an_obstacle_goes_through_json():
    made = Obstacle("because", "model.py:3", "layers.0.moe", Rank.FORBIDS, Stage.SUM)
    assert Obstacle.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert str(made) == "layers.0.moe, sum: because (at model.py:3)"
    with pytest.raises(KeyError):
        Obstacle.from_dict({**made.to_dict(), "rank": "certain"})


class Slots(nn.Module):
    """The experts in a module of their own, which is handed rows in slots."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, slots):
        return torch.stack([expert(rows) for expert, rows in zip(self.experts, slots, strict=True)])


class NoisySlots(Block):
    """One-hot dispatch into slots of experts that are a module of their own; the second choice is drawn."""

    def __init__(self):
        super().__init__()
        self.inner = Slots(self.experts)
        del self.experts

    def choose(self, score):
        return (score + torch.rand_like(score)).topk(2, -1)[1]

    def forward(self, x):
        rows = x.reshape(-1, H)
        score = self.gate(rows)
        mask = torch.zeros_like(score).scatter(1, self.choose(score), 1.0)
        place = nn.functional.one_hot(((mask.cumsum(0) - 1) * mask).long(), len(rows)) * mask[..., None]
        out = self.inner(torch.einsum("tes,th->esh", place, rows))
        return torch.einsum("tes,te,esh->th", place, score.softmax(-1) * mask, out).view(x.shape)


def test_a_random_router_outside_beats_what_the_module_of_experts_lacks():
    for model in (build(NoisySlots), nn.Sequential(build(NoisySlots), nn.Linear(H, H)).eval()):
        (block,) = [b for b in moeopt.explain(model, X).blocks if b.kind == "moe"]
        assert block.reason.startswith("its forward is random at inference (rand_like at ")
        assert block.experts == E and "test_obstacles.py" in block.source
        assert block.obstacles and all(o.module.endswith("inner") for o in block.obstacles)


class Branching(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if float(y.mean()) > 0 else y


class Around(nn.Module):
    """Noise around a block is no part of the block."""

    def __init__(self):
        super().__init__()
        self.moe = build(Branching)

    def forward(self, x):
        return self.moe(x + torch.rand_like(x))


def test_the_same_block_has_the_same_entry_in_other_surroundings():
    entries = []
    for model in (build(Branching), Around(), nn.Sequential(nn.Linear(H, H), build(Branching), nn.Dropout())):
        (block,) = [b for b in moeopt.explain(model.eval(), X).blocks if b.kind == "moe"]
        entries.append((block.reason, block.source, block.experts))
    assert len(set(entries)) == 1 and "Python number" in entries[0][0], entries


def test_an_error_of_moeopt_stands_only_where_there_is_nothing_else(monkeypatch, tmp_path):
    """The inner module fails inside moeopt, the outer one is random: the report says what the owner can change."""
    real = pipeline_block._rewrite

    def fail(name, *args):
        if name == "inner":
            raise RuntimeError("inside")
        return real(name, *args)

    monkeypatch.setattr(pipeline_block, "_rewrite", fail)
    (block,) = moeopt.optimize(build(NoisySlots), X, dump=tmp_path).report.blocks
    assert "is random at inference" in block.reason and block.nearest == ""
    (kept,) = block.obstacles
    assert kept.rank is Rank.INTERNAL and kept.reason.startswith("moeopt itself failed on it (RuntimeError: inside")
    assert "also met: inner, rewrite: moeopt itself failed" in next(tmp_path.glob("*/reading.txt")).read_text()


def test_a_report_with_obstacles_goes_through_json():
    report = moeopt.explain(build(NoisySlots), X)
    assert report.blocks[0].obstacles and Report.from_json(report.to_json()).blocks == report.blocks


class FirstSix(Block):
    """Each expert keeps its first six tokens."""

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (part[:6] for part in torch.where(ids == e))
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


@pytest.mark.parametrize(
    "expert",
    [
        lambda: nn.Linear(H, H),
        lambda: nn.Sequential(nn.Linear(H, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, H)),
        lambda: nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, H)),
    ],
    ids=["one matrix", "a norm inside", "three layers"],
)
def test_a_capacity_around_any_function_of_a_row_is_named(expert):
    model = build(FirstSix)
    model.experts = nn.ModuleList(expert() for _ in range(E))
    (block,) = [b for b in moeopt.explain(model.eval(), X.repeat(4, 1, 1)).blocks if b.kind == "moe"]
    assert block.reason.startswith("its experts leave out tokens that the router gave them (a capacity"), block.reason


def test_weights_that_a_hook_computes_name_the_function_that_removes_it():
    model = build()
    for expert in model.experts:
        nn.utils.spectral_norm(expert.w1)
    (block,) = [b for b in moeopt.explain(model, X).blocks if b.kind == "moe"]
    assert "(SpectralNorm on experts.0.w1)" in block.reason and "torch.nn.utils.remove_spectral_norm" in block.reason


def test_gates_over_several_numbers_of_experts_are_no_experts_of_several_sizes():
    case = CASES["gates_of_tasks_in_levels"]
    for block in moeopt.explain(case.build(), case.inputs()[0]).blocks:
        assert not any("different shapes" in o.reason for o in block.obstacles), block.obstacles

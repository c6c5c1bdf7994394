"""Routers that answer by one vector a slot: read where they are, declined where a vector is missing, never swapped."""

import dataclasses
import warnings

import pytest
import torch

import moeopt
from moeopt.pipeline import coverage
from tests.helpers import assert_same, run
from tests.zoo import CASES
from tests.zoo.library_styles import WeightsPerSlot, WinnerThenRunnerUp

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))


def block_of(opt):
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    return block


def optimise(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moeopt.optimize(model, X, verify="fast")


@pytest.mark.parametrize("name", ["weights_per_slot", "winner_then_runner_up"])
def test_the_weights_follow_their_ids(name):
    model = CASES[name].build()
    opt = optimise(model)
    assert block_of(opt).status == "rewritten" and block_of(opt).top_k == 2
    for rows in ((1, 1), (4, 30)):
        x = torch.randn(*rows, 16)
        assert_same(run(opt, ((x,), {})), run(model, ((x,), {})))


@pytest.mark.parametrize("part", ["ids", "weights"])
def test_swapped_vectors_are_caught(part, monkeypatch):
    recognize = coverage.recognize

    def swapped(recipe):
        return dataclasses.replace(recipe, source=recipe.beside[0], beside=(recipe.source,))

    def damaged(tape, known=None, *rest, **kwargs):
        found = recognize(tape, None if known is None else damaged.honest, *rest, **kwargs)
        damaged.honest = found if known is None else damaged.honest
        return [
            dataclasses.replace(f, routing=dataclasses.replace(f.routing, **{part: swapped(getattr(f.routing, part))}))
            for f in found
        ]

    monkeypatch.setattr(coverage, "recognize", damaged)
    model = CASES["winner_then_runner_up"].build()
    opt = optimise(model)
    assert block_of(opt).status == "declined" and "reverted" in block_of(opt).reason
    with torch.no_grad():
        assert torch.equal(opt(X), model(X))


class SecondOfAnother(WeightsPerSlot):
    """The second weight is applied to a copy of the first expert: no vector holds it for the second id."""

    def choices(self, scores):
        ids, gates = super().choices(scores)
        return ids, [gates[0], gates[0].roll(1)]


def test_a_weight_of_another_token_is_no_vector_of_this_one():
    torch.manual_seed(0)
    model = SecondOfAnother().eval()
    opt = optimise(model)
    with torch.no_grad():
        for rows in (1, 5, 12):
            x = torch.randn(1, rows, 16)
            torch.testing.assert_close(opt(x), model(x))


class ConstantSlots(WinnerThenRunnerUp):
    """Weights that are constants: their place cannot be told by values."""

    def choices(self, scores):
        ids, gates = super().choices(scores)
        return ids, [torch.full_like(g, 0.5) for g in gates]


def test_constant_weights_per_slot_are_right_either_way():
    torch.manual_seed(0)
    model = ConstantSlots(count=5).eval()
    opt = optimise(model)
    with torch.no_grad():
        torch.testing.assert_close(opt(X), model(X))

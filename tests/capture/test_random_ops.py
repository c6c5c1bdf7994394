"""Noise that the code multiplies by 0 is no randomness; any other draw that reaches the result is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.capture.random_ops import draws_that_matter, refuse_random
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from tests.toy_moe import Block, E, H, X, build, close, optimized


class Gate(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.noise, self.spread = noise, nn.Linear(H, E)

    def forward(self, x):
        return x[..., :E] + self.noise(self, x[..., :E])


OFF = {
    "times the flag": lambda m, x: torch.randn_like(x) * m.training,
    "times zero, then scaled": lambda m, x: (torch.rand_like(x) * 0.0).neg() * 3,
    "the spread is switched off": lambda m, x: torch.randn_like(x) * ((F.softplus(x) + 0.01) * float(m.training)),
    "cast and reshaped": lambda m, x: (0 * torch.rand(x.numel())).double().view(x.shape).to(x),
}
ON = {
    "a draw": lambda m, x: torch.randn_like(x),
    "times one": lambda m, x: torch.randn_like(x) * (not m.training),
    "one of two": lambda m, x: torch.randn_like(x) * 0 + torch.rand_like(x),
    "zero at these values": lambda m, x: torch.randn_like(x) * torch.zeros(1),
    "not a product": lambda m, x: torch.rand_like(x) * 0 + (torch.rand_like(x) > 0.5),
}


@pytest.mark.parametrize("name", OFF)
def test_noise_times_zero_is_none(name):
    assert draws_that_matter(record(Gate(OFF[name]).eval(), (X,))) == []


@pytest.mark.parametrize("name", ON)
def test_any_other_draw_is_refused_at_its_line(name):
    with pytest.raises(Declined, match="is random at inference") as caught:
        refuse_random(record(Gate(ON[name]).eval(), (X,)), training=False)
    assert "test_random_ops.py:" in caught.value.where and caught.value.rank is Rank.FORBIDS


class NoisyInTraining(Block):
    def route(self, x):
        score = self.gate(x)
        score = score + torch.randn_like(score) * F.softplus(score) * float(self.training)
        w, ids = score.softmax(-1).topk(2, -1)
        return ids, w


def test_a_router_with_noise_that_is_switched_off_is_rewritten():
    model = build(NoisyInTraining)
    fast = optimized(model)
    with torch.no_grad():
        close(fast(X), model(X))


def test_an_engine_does_without_the_draw(tmp_path):
    pytest.importorskip("onnxruntime")
    model = build(NoisyInTraining)
    engine = moeopt.optimize(model, X, backend="onnxruntime", verify="fast")
    engine.save(tmp_path / "bundle")
    with torch.no_grad():
        close(moeopt.load(tmp_path / "bundle")(X), model(X))

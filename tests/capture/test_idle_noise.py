"""Noise that the code multiplies by the number 0 is no part of a trace's result."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.capture.random_ops import draws_that_matter
from moeopt.capture.tape import record
from moeopt.errors import StaleModelWarning
from tests.helpers import assert_same
from tests.zoo.row_functions import D, NormInside, Routed


class Noisy(Routed):
    """Noise on the rows, in training only."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x) * self.training)


class NoisyExpert(NormInside):
    """Noise inside each expert, in training only."""

    def forward(self, x):
        h = self.norm(self.up(x))
        return self.down(torch.relu(h - 0.1 * torch.randn_like(h) * self.training))


def test_the_sum_reads_the_number_instead():
    tape = record(Noisy(NormInside).eval(), (torch.randn(2, 3, D),))
    assert tape.random_nodes() and not draws_that_matter(tape)
    assert any(node.args == (node.args[0], 0) for node in tape.nodes if "add" in str(node.target))


@pytest.mark.parametrize(
    "make", [lambda: Noisy(NormInside, n=12), lambda: Routed(NoisyExpert, n=12)], ids=["rows", "experts"]
)
def test_such_blocks_are_rewritten_and_stay_random_in_training(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 9, D)
    done = moeopt.optimize(model, x, verify="fast")
    (block,) = [b for b in done.report.blocks if b.kind == "moe"]
    assert block.status == "rewritten", block.reason
    assert_same(done(x), model(x))
    done.model.train()
    with pytest.warns(StaleModelWarning):
        first, second = done(x), done(x)
    assert not torch.equal(first, second)


class Scaled(nn.Module):
    def forward(self, x):
        return x[:1] + torch.randn_like(x) * 0, x + torch.randn_like(x) * 2


def test_noise_of_another_shape_and_noise_that_counts_stay():
    tape = record(Scaled(), (torch.randn(3, 4),))
    assert len(draws_that_matter(tape)) == 1
    assert not any(0 in node.args for node in tape.nodes if "add" in str(node.target))

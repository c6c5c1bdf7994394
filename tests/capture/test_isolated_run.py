"""A run without a tape leaves the module as it was."""

import pytest
import torch
from torch import nn

from moeopt.capture.isolated_run import run_quietly
from moeopt.errors import CaptureError


class Busy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(2))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen += x
        self.weight[0].mul_(3)
        self.last = x
        x.add_(torch.rand(2))
        return self.weight * self.calls


def test_everything_is_put_back():
    module, x, rng = Busy(), torch.ones(2), torch.get_rng_state()
    assert torch.equal(run_quietly(module, (x,)), torch.tensor([3.0, 1.0]))
    assert torch.equal(module.weight, torch.ones(2))
    assert module.calls == 0 and not hasattr(module, "last") and torch.equal(module.seen, torch.zeros(2))
    assert torch.equal(x, torch.ones(2)) and torch.equal(rng, torch.get_rng_state())


def test_a_module_that_raises_is_left_as_it_was_too():
    module = Busy()
    with pytest.raises(CaptureError, match="Busy raised RuntimeError: .*; check that it runs on these inputs in eager"):
        run_quietly(module, (torch.ones(3),))
    assert module.calls == 0 and torch.equal(module.seen, torch.zeros(2))

"""Two tapes of one call: the same, or not."""

import pytest
import torch
from torch import nn

from moeopt.capture.same_graph import same_computation
from moeopt.capture.tape import record
from tests.capture.tiny import rand


class Modes(nn.Module):
    """Computes ``evaluated`` in evaluation mode and ``trained`` in training mode."""

    def __init__(self, evaluated, trained):
        super().__init__()
        self.evaluated, self.trained = evaluated, trained
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return (self.trained if self.training else self.evaluated)(self, x)


def both(evaluated, trained):
    module, x = Modes(evaluated, trained), rand(3)
    return record(module.eval(), (x,)), record(module.train(), (x,), keep_values=False)


def doubled(m, x):
    y = torch.zeros_like(x)
    y += 2 * x
    return y


def count(m, x):
    m.seen += 1
    return doubled(m, x)


def keep(m, x):
    m.last = x * 2
    return doubled(m, x)


def test_one_code_is_the_same_whoever_holds_its_tensors():
    assert same_computation(*both(doubled, doubled))


@pytest.mark.parametrize(
    ("evaluated", "trained"),
    [
        (lambda m, x: x * 2, lambda m, x: x * 3),
        (lambda m, x: x * 1, lambda m, x: x * 1.0),
        (lambda m, x: x[:2], lambda m, x: x[:1]),
        (lambda m, x: (x * 2, x), lambda m, x: (x, x * 2)),
        (lambda m, x: (x * 2,), lambda m, x: [x * 2]),
        (lambda m, x: {"a": x * 2}, lambda m, x: {"b": x * 2}),
        (lambda m, x: x * torch.tensor([1.0, 2, 3]), lambda m, x: x * torch.tensor([1.0, 2, 4])),
        (doubled, lambda m, x: doubled(m, x).exp()),
        (doubled, count),
        (doubled, keep),
    ],
)
def test_a_difference_is_seen(evaluated, trained):
    assert not same_computation(*both(evaluated, trained))

"""A copy that was changed before its first call: nothing was prepared for it, so what it is then was never verified."""

import copy
import pickle

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, E, H, build


class Doubling(torch.Tensor):
    """As a weight, it gives twice the product."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is torch.nn.functional.linear else out


class Named(torch.Tensor):
    """It runs no code of its own."""


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def widen(block):
    torch.manual_seed(1)
    for expert in block.experts:
        for name, shape in (("w1", (24, H)), ("w3", (24, H)), ("w2", (H, 24))):
            getattr(expert, name).weight = nn.Parameter(torch.randn(shape))


def as_class(cls):
    def change(block):
        linear = block.experts[0].w1
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(cls))

    return change


def one_less(block):
    block.experts = block.experts[: E - 1]
    block.gate.weight = nn.Parameter(block.gate.weight[: E - 1].detach().clone())


CHANGES = {
    "wider": (widen, "experts.0.w1.weight is (24, 16) and was (16, 16)"),
    "a class of its own": (as_class(Doubling), "experts.0.w1.weight runs code of Doubling"),
    "a class without code": (as_class(Named), ""),
    "weight norm": (lambda b: nn.utils.parametrizations.weight_norm(b.experts[0].w1), "no longer a plain Parameter"),
    "parametrised": (
        lambda b: nn.utils.parametrize.register_parametrization(b.experts[3].w2, "weight", Negative()),
        "experts.3.w2",
    ),
    "an expert less": (one_less, "experts.3 was removed"),
    "another dtype": (lambda b: b.experts[0].w1.double(), "experts.0.w1.weight is torch.float64 and was torch.float32"),
    "turned": (lambda b: setattr(b.experts[0].w1, "weight", nn.Parameter(b.experts[0].w1.weight.t())), ""),
}
COPIES = {
    "itself": lambda fast: fast.model,
    "a copy": lambda fast: copy.deepcopy(fast).model,
    "a pickle": lambda fast: pickle.loads(pickle.dumps(fast)).model,
}


def result_or_error(block, x):
    try:
        return block(x)
    except RuntimeError as error:
        return str(error)


@pytest.mark.sample(3)
@pytest.mark.parametrize("of", COPIES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_that_is_changed_before_its_first_call_is_followed_or_told(name, of):
    change, told = CHANGES[name]
    x = torch.randn(12, H)
    fast, original = COPIES[of](moeopt.optimize(build(), x, verify="fast")), build()
    assert isinstance(fast, Block)
    change(fast), change(original)
    with torch.no_grad():
        if told:
            with pytest.warns(StaleModelWarning, match="runs its original code") as warned:
                given = result_or_error(fast, x)
            assert told in str(warned[0].message) or of == "itself"
        else:
            given = fast(x)
        expected = result_or_error(original, x)
        if isinstance(expected, str):
            assert given == expected
        else:
            torch.testing.assert_close(given, expected)
    assert (fast.forward.fallbacks > 0) is bool(told)

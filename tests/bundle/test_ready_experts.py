"""The experts of a loaded bundle are made ready once where their weights are those of the file."""

import pytest
import torch

import moeopt
from moeopt.errors import BundleError
from tests.toy_moe import H


@pytest.fixture
def engine(toy_bundle):
    return moeopt.load(toy_bundle)


def ready_steps(engine):
    return [step for step in engine._runner.steps if step.op is torch.ops.moeopt.experts.default]


def test_a_call_of_known_sizes_calls_no_op(toy_bundle, engine):
    (step,) = ready_steps(engine)
    x = torch.randn(1, 5, H)
    measured = engine(x)  # of these sizes the first is measured, by the op
    step.function = lambda *args: pytest.fail("the op was called")
    assert torch.equal(engine(x), measured)
    assert torch.equal(engine(x.flip(1)), moeopt.load(toy_bundle)(x.flip(1)))


def test_what_an_op_of_it_raises_is_told_as_of_any_op(engine):
    (step,) = ready_steps(engine)
    x = torch.randn(1, 5, H)
    engine(x)

    def stops(*args):
        raise RuntimeError("out of sorts")

    step.ready = stops
    with pytest.raises(BundleError, match=f"the graph stops at '{step.out}'.*moeopt.experts.*out of sorts"):
        engine(x)

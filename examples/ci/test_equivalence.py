"""What a project keeps about its optimised model: that it is the model, and stays it for other sizes."""

import pytest
import torch
from my_model import build

import moeopt


@pytest.fixture(scope="module")
def model_and_fast():
    model, x = build()
    return model, moeopt.optimize(model, x)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40)])
def test_the_rewrite_is_the_model(assert_equivalent, model_and_fast, shape):
    model, fast = model_and_fast
    assert_equivalent(model, fast, torch.randn(*shape, 64))


def test_every_block_is_rewritten(model_and_fast):
    """A new version of the model or of moeopt that declines a block is slower, and not wrong: say so here."""
    _, fast = model_and_fast
    assert [block.status for block in fast.report.blocks] == ["rewritten"], str(fast.report)

"""Blocks that were rewritten inside of a module that is tried next say nothing of what that trial runs."""

import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from moeopt.rewrite.install import rewritten_forward
from tests.toy_moe import Block, H, build, seeded


class Tower(nn.Sequential):
    """Without a residual nothing is left for the last block, which is declined; then the module around it is tried."""

    def __init__(self):
        super().__init__(*(Block() for _ in range(6)))


def test_trials_of_the_module_around_rewritten_blocks_are_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)
        fast = moeopt.optimize(build(Tower), seeded(2, 8, H), verify="fast")
    assert [block.status for block in fast.report.blocks] == ["rewritten"] * 5 + ["declined"]
    inner = [rewritten_forward(block) for block in fast.model][:5]
    assert all(inner) and not any(one.fallbacks or one.last_refusal or one.silent for one in inner)
    told = pytest.warns(StaleModelWarning, match=r"called with torch.float64 where torch.float32 was verified")
    with told, pytest.raises(RuntimeError):
        fast(seeded(2, 8, H).to(torch.float64))

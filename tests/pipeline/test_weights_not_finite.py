"""A declined block with weights that are not finite: which Parameter, how many entries, and when that is no reason."""

import re

import pytest
import torch

import moeopt
from tests.zoo.dispatches import D, MaskedSelect


def block_of(change):
    torch.manual_seed(0)
    model = MaskedSelect().eval()
    with torch.no_grad():
        change(model)
    (block,) = moeopt.explain(model, (torch.randn(12, D),), verify="fast").blocks
    return block


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.experts[2][0].weight[3, 4].fill_(torch.nan), r"experts\.2\.0\.weight has 1 NaN of its 384"),
        (lambda m: m.experts[1][2].bias[:3].fill_(torch.inf), r"experts\.1\.2\.bias has 3 infinite of its 16"),
        (lambda m: m.gate.weight[1, :2].fill_(torch.nan), r"gate\.weight has 2 NaN of its 64"),
    ],
)
def test_the_parameter_and_the_count_are_named(change, words):
    reason = block_of(change).reason
    assert re.match(words, reason) and "torch.nan_to_num_" in reason


def test_an_infinite_bias_that_shuts_an_expert_off_is_no_damage():
    assert block_of(lambda m: m.gate.bias[2].fill_(-torch.inf)).status == "rewritten"


def test_8_bit_floats_may_be_damaged_too():
    def change(model):
        model.experts[2][0].weight[3, 4].fill_(torch.nan)
        damaged = torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)
        model.codes = torch.nn.Parameter(damaged, requires_grad=False)

    assert re.match(r"codes has 1 NaN of its 2", block_of(change).reason)

"""A hint names the function of the blocks its pattern matches, and of no others."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.recognise.hints import expert_module, hint_for
from tests.toy_moe import Block, X, build

SPEC = ExpertsSpec(rows="plain", activation="tanh")


def assumed(hints, path):
    block = build()
    return hint_for(hints, path, block, {id(p) for p in block.experts.parameters()})


def test_the_first_pattern_that_matches():
    relu = ExpertsSpec(rows="plain", activation="relu")
    hints = {"layers.*.moe": SPEC, "layers.*": relu}
    assert assumed(hints, "layers.3.moe") is SPEC and assumed(hints, "layers.3") is relu
    assert assumed(hints, "head") is None and assumed({}, "head") is None


def test_a_callable_is_given_the_module_of_an_expert():
    def read(expert):
        return ExpertsSpec(rows="plain", activation=type(expert.act).__name__.lower())

    assert assumed({"*": read}, "moe").activation == "silu"


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, 8, 8)) for _ in "ud")


class Lists(nn.Module):
    """One list of products a layer of the experts: no module is one expert's."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.up, self.down = (nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in "ud")


def weights_of(*modules):
    return {id(p) for m in modules for p in m.parameters()}


def test_the_module_of_an_expert_is_found_by_its_weights():
    block = Block()
    assert expert_module(nn.Sequential(block), weights_of(block.experts)) is block.experts[0]
    stacked = Stacked()
    assert expert_module(nn.ModuleList([stacked, nn.Linear(8, 8)]), weights_of(stacked)) is stacked
    lists = Lists()
    assert expert_module(lists, weights_of(lists.up, lists.down)) is lists.up[0]
    assert expert_module(lists, set()) is lists


def test_a_hint_must_be_a_spec():
    with pytest.raises(UsageError, match=r"hints\['\*'\] gave 'silu' at layers.0; it must be an ExpertsSpec: moe"):
        assumed({"*": "silu"}, "layers.0")
    with pytest.raises(UsageError, match="gave None for the Expert that it was called with at moe; it must be"):
        assumed({"*": lambda expert: None}, "moe")


def test_an_error_of_a_callable_says_what_it_is_given_and_what_it_returns():
    said = (
        r"hints\['\*'\] raised TypeError for the Expert that it was called with at Block: sin\(\): .* not Expert; a "
        r"callable is given the module of an expert and returns what it computes, such as moeopt.ExpertsSpec\(rows="
    )
    with pytest.raises(UsageError, match=said) as caught:
        moeopt.optimize(build(), X, hints={"*": lambda rows: torch.sin(rows)}, verify="off")
    assert isinstance(caught.value.__cause__, TypeError)

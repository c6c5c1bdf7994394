"""Which part of a Parameter is whose: of one expert, of several along a dimension, or of nobody in particular."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.distributed.install import expert_ops
from moeopt.distributed.parts import OwnWeight, StackedWeight, WholeWeight
from tests.distributed.models import Stacked, optimised, tokens
from tests.toy_moe import Block, H
from tests.zoo import CASES


def weights(opt):
    notes = []
    (op,) = expert_ops(opt.model, notes)
    return {w.path: w for w in op.weights}, notes


def test_an_experts_own_weight():
    found, notes = weights(optimised())
    assert found["experts.2.w1.weight"] == OwnWeight("experts.2.w1.weight", 2) and len(found) == 12 and not notes


def test_stacks_along_any_dimension():
    for axis in (0, 1, 2):
        found, _ = weights(optimised(Stacked, axis=axis))
        assert found["w_in"] == StackedWeight("w_in", axis, 1, (0, 1, 2, 3, 4))


@pytest.mark.parametrize(
    ("name", "path", "length", "order"),
    [
        ("layout_one_parameter_for_all", "w", 1, (0, 1, 2, 3)),  # gate, up and down of all experts
        ("layout_flat_slices", "w1", 16, (0, 1, 2, 3)),  # rows 16 e to 16 e + 15 of one matrix
        ("layout_flipped_bank", "w2", 1, (3, 2, 1, 0)),
        ("layout_permuted_bank", "w1", 1, (1, 3, 0, 2)),
    ],
)
def test_stacks_as_others_lay_them_out(name, path, length, order):
    args, kwargs = CASES[name].inputs()
    found, notes = weights(moeopt.optimize(CASES[name].build(), kwargs or args, verify="off"))
    assert found[path] == StackedWeight(path, 0, length, order) and not notes


class Tied(Block):
    def __init__(self):
        super().__init__()
        self.experts[1].w1 = self.experts[0].w1


class Read(Block):
    """Code beside the experts reads a weight of one."""

    def forward(self, x):
        return super().forward(x) + self.experts[0].w2.weight.sum() * 0.01


def test_what_others_read_stays_whole():
    found, notes = weights(optimised(Tied))
    assert isinstance(found["experts.0.w1.weight"], WholeWeight)
    assert notes == ["Tied: every rank keeps experts.0.w1.weight whole: the model has it under several names"]
    found, notes = weights(optimised(Read))
    assert found["experts.0.w2.weight"] == WholeWeight("experts.0.w2.weight", "code beside the experts reads it")
    assert isinstance(found["experts.1.w2.weight"], OwnWeight)


def test_a_dense_model_has_none():
    opt = moeopt.optimize(nn.Sequential(nn.Linear(H, H), nn.ReLU()), tokens(4), verify="off")
    assert not list(expert_ops(opt.model, [])) and torch.is_tensor(opt(tokens(2)))

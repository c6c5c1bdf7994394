"""Banks look weights up; they hold no copies and check their lengths."""

import pytest
import torch

from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights


def test_lookups_are_views_of_the_live_weights():
    w_in, w_out, bias = torch.zeros(3, 4, 2), torch.zeros(3, 2, 2), torch.zeros(3, 2)
    bank = StackedExpertWeights([w_in], w_out, b_out=bias)
    w_in[1] = 7
    assert bank.w_in(1)[0].eq(7).all() and bank.w_in(1)[0].data_ptr() == w_in[1].data_ptr()
    assert bank.b_in(0) == (None,) and bank.b_out(2).shape == (2,) and bank.norm(0) is None
    assert bank.num_experts == 3 and bank.stacked() is bank


def test_a_list_bank_holds_the_very_tensors():
    weights = [torch.zeros(4, 2) for _ in range(3)]
    bank = ListExpertWeights([weights, weights], weights, b_in=[None, [torch.ones(4), None, None]])
    assert bank.w_in(2) == (weights[2], weights[2]) and bank.w_in(2)[0] is weights[2]
    assert bank.b_in(1) == (None, None) and bank.b_in(0)[1].eq(1).all()
    assert bank.num_experts == 3 and bank.stacked() is None


def test_lengths_must_agree():
    with pytest.raises(UsageError, match="W_out holds 3 experts and another weight 2; give every weight one entry"):
        StackedExpertWeights([torch.zeros(2, 4, 2)], torch.zeros(3, 2, 2))
    with pytest.raises(UsageError, match="ListExpertWeights: W_out holds 1 experts and another weight 2"):
        ListExpertWeights([[torch.zeros(4, 2)] * 2], [torch.zeros(2, 2)])


def test_biases_are_one_for_each_first_matrix():
    w_in, w_out, bias = torch.zeros(2, 4, 3), torch.zeros(2, 3, 4), torch.zeros(2, 4)
    with pytest.raises(
        UsageError, match="StackedExpertWeights: w_in has 1 part and b_in 2; give each part of w_in its"
    ):
        StackedExpertWeights([w_in], w_out, [bias, bias])
    with pytest.raises(UsageError, match="ListExpertWeights: w_in has 2 parts and b_in 1; give each part of w_in its"):
        ListExpertWeights([list(w_in), list(w_in)], list(w_out), [list(bias)])
    x, ids, weights = torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    with pytest.raises(UsageError, match="w_in has 1 part and b_in 2"):
        spec = ExpertsSpec(rows="plain", activation="relu").text
        torch.ops.moeopt.experts(x, ids, weights, [w_in], [w_out], [bias, bias], [], [], spec)

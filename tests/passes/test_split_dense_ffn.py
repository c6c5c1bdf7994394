"""Neurons in groups: which regions of which Parameter each group is, and that the sum of groups is the whole."""

import pytest
import torch

from moeopt.errors import Declined
from moeopt.ir.weight_refs import expert_paths
from moeopt.ops.reference import experts_reference
from moeopt.passes.split_dense_ffn import every_group, neighbours, split, weight_one
from moeopt.recognise.dense_ffn import recognize_dense
from moeopt.rewrite.live_weights import LiveExpertWeights
from tests.capture.tiny import rand
from tests.recognise.test_dense_ffn import FORMS, Convolutions, Packed, find_candidates, find_sites, read, record
from tests.recognise.tiny import GLU, H, I, seeded


@pytest.mark.parametrize("groups", [2, 3, 5, I])
@pytest.mark.parametrize("make", [form[0] for form in FORMS])
def test_groups_add_up(make, groups):
    module, x = seeded(make).double(), rand(5, H).double()
    tape = record(module, (x,))
    (candidate,) = find_candidates(tape, find_sites(tape))
    whole = recognize_dense(tape, candidate)
    found = split(whole, neighbours(I, groups))
    assert len(found.experts) == groups and found.routing.top_k == groups
    assert expert_paths(found.experts) == expert_paths([whole.weights])
    assert [e.w_out.k for e in found.experts] == [len(g) for g in neighbours(I, groups)]
    assert [e.b_out is not None for e in found.experts][1:] == [False] * (groups - 1)
    bank = LiveExpertWeights(module, found.experts, (found.spec.w_in_layout, found.spec.w_out_layout))
    y = experts_reference(x, every_group(x, 1, groups), weight_one(x, 1, groups), bank, found.spec)
    torch.testing.assert_close(y, module(x), rtol=1e-12, atol=1e-13)  # float64: only the order of a sum differs


def test_groups_are_views_of_the_users_parameters():
    module = seeded(lambda: Packed(bias=True))
    tape = record(module, (rand(5, H),))
    (candidate,) = find_candidates(tape, find_sites(tape))
    found = split(recognize_dense(tape, candidate), neighbours(I, 3))
    bank = LiveExpertWeights(module, found.experts, ("oi", "oi"))
    assert found.spec.rows == "separate"
    for e in range(3):
        gate, up = bank.w_in(e)
        assert torch.equal(gate, module.w13.weight[4 * e : 4 * e + 4])
        assert torch.equal(up, module.w13.weight[I + 4 * e : I + 4 * e + 4])
        assert torch.equal(bank.w_out(e), module.w2.weight[:, 4 * e : 4 * e + 4])
        for part in (gate, up, bank.w_out(e)):
            assert part.untyped_storage().data_ptr() in (
                module.w13.weight.untyped_storage().data_ptr(), module.w2.weight.untyped_storage().data_ptr(),
            )  # fmt: skip


def test_groups_of_one_parameter_without_biases_are_one_stack():
    module = seeded(GLU)
    tape = record(module, (rand(5, H),))
    (candidate,) = find_candidates(tape, find_sites(tape))
    stacked = LiveExpertWeights(
        module, split(recognize_dense(tape, candidate), neighbours(I, 3)).experts, ("oi", "oi")
    ).stacked()
    assert stacked is not None and stacked.w_out_s.shape == (3, H, 4)
    assert stacked.w_out_s.data_ptr() == module.down.weight.data_ptr()


def test_ids_and_weights_count_tokens_whatever_the_feature_axis():
    x = rand(2, H, 3, 4).bfloat16()
    assert every_group(x, 1, 5).shape == (24, 5) and every_group(x, 1, 5)[7].tolist() == [0, 1, 2, 3, 4]
    ones = weight_one(x, 1, 5)
    assert ones.shape == (24, 5) and ones.dtype == torch.bfloat16 and bool((ones == 1).all())
    assert every_group(x[:0], 1, 5).shape == (0, 5)
    assert split(read(Convolutions, rand(2, H, 3, 4)), neighbours(I, 2)).tokens.count == 24


def test_neighbours():
    assert neighbours(12, 3) == [range(0, 4), range(4, 8), range(8, 12)]
    assert [len(g) for g in neighbours(11, 4)] == [3, 3, 3, 2] and neighbours(11, 4)[-1] == range(9, 11)
    with pytest.raises(Declined) as caught:
        neighbours(3, 4)
    assert caught.value.reason == "it has 3 neurons, too few for 4 groups; give experts=3 or less"

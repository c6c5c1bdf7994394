"""Neurons by what they answer: every neuron once, sizes even, those that are alike together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeopt.capture.tape import record
from moeopt.pipeline.coactivation_groups import MOST_TOKENS, activity, coactive
from moeopt.recognise.dense_ffn import recognize_dense
from moeopt.rewrite.live_weights import LiveExpertWeights
from tests.capture.tiny import rand
from tests.recognise.test_dense_ffn import FORMS, find_candidates, find_sites
from tests.recognise.tiny import H, I, seeded


@given(st.integers(1, 24), st.data())
@settings(max_examples=20, deadline=None)
def test_every_neuron_is_in_one_group_and_sizes_are_even(inner, data):
    groups = data.draw(st.integers(1, inner))
    seen = torch.rand(9, inner, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    seen[:, ::3] = 0  # neurons that never answer
    found = coactive(seen, groups)
    assert sorted(n for group in found for n in group) == list(range(inner))
    assert len(found) == groups and max(map(len, found)) - min(map(len, found)) <= 1
    assert found == coactive(seen.clone(), groups) and all(list(g) == sorted(g) for g in found)


def test_neurons_that_answer_the_same_tokens_come_together():
    kinds = torch.arange(12) % 3
    seen = torch.zeros(30, 12)
    for kind in range(3):
        seen[10 * kind : 10 * kind + 10, kinds == kind] = torch.rand(10, 4) + 0.1
    assert coactive(seen, 3) == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]


def test_values_that_are_no_numbers_do_not_matter():
    seen = torch.rand(6, 4)
    seen[0, 0], seen[1, 1] = float("nan"), float("inf")
    assert sorted(n for g in coactive(seen, 2) for n in g) == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [form[0] for form in FORMS])
def test_activity_is_what_the_second_product_reads(make):
    module, x = seeded(make), rand(5, H)
    tape = record(module, (x,))
    (candidate,) = find_candidates(tape, find_sites(tape))
    ffn = recognize_dense(tape, candidate)
    bank = LiveExpertWeights(module, [ffn.weights], (ffn.spec.w_in_layout, ffn.spec.w_out_layout))
    with torch.no_grad():
        got = activity(ffn, bank, x)
    want = tape.value(candidate.out.operand).movedim(candidate.out.axis_in, -1).flatten(0, -2).abs()
    assert got.shape == (5, I)
    torch.testing.assert_close(got, want.float())
    assert len(activity(ffn, bank, x.repeat(MOST_TOKENS, 1))) == MOST_TOKENS

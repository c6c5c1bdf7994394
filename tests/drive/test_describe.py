"""A block in the words of a report."""

import pytest
import torch

from moeopt.drive.describe import dense_reason, describe_router
from moeopt.drive.discover import discover
from moeopt.passes.recognize_experts import recognize
from tests.ir.tiny import rand
from tests.passes.test_frontier import EveryOne, Mask, MaskAlone, Sparse
from tests.passes.test_recognize_experts import Hard, OnInput
from tests.passes.tiny import H, MoE, ffn, seeded, tape_of


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (MoE, "top-2 of 4"),
        (Hard, "top-1 of 4, equal weights"),
        (OnInput, "top-2 of 4, weight on input"),
        (Mask, "one-hot, 1 of 4"),
        (MaskAlone, "one-hot, 1 of 4, equal weights"),
        (EveryOne, "all 4 experts, weighted"),
        (Sparse, "sparse table over 4 experts"),
    ],
)
def test_each_kind_of_routing_has_its_words(make, words):
    (found,) = recognize(tape_of(make))
    assert describe_router(torch.nn.Module(), "", found, None) == words


def test_a_dense_ffn_is_left_with_a_reason():
    (place,) = discover(seeded(ffn), (rand(5, H),), {})
    assert dense_reason(place).startswith("one expert that sees every token")

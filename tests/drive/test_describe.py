"""A block in the words of a report."""

import pytest

from moeopt.drive.describe import dense_reason, describe_router
from moeopt.drive.discover import discover
from moeopt.passes.recognize_experts import recognize
from moeopt.passes.recognize_router import recognize_router
from tests.ir.tiny import rand
from tests.passes.test_frontier import EveryOne, Mask, MaskAlone, Sparse
from tests.passes.test_recognize_experts import Hard, OnInput
from tests.passes.tiny import H, MoE, ffn, seeded, tape_of


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (MoE, "softmax, top-2 of 4, renormalised"),
        (Hard, "top-1 of 4, equal weights"),
        (OnInput, "softmax, top-2 of 4, renormalised, weight on input"),
        (Mask, "softmax, top-1 of 4"),
        (MaskAlone, "one-hot, 1 of 4, equal weights"),
        (EveryOne, "dense softmax over 4"),
        (Sparse, "sparse table over 4 experts"),
    ],
)
def test_each_kind_of_routing_has_its_words(make, words):
    tape = tape_of(make)
    (found,) = recognize(tape)
    assert describe_router(found, recognize_router(tape, found)) == words


def test_a_dense_ffn_is_left_with_a_reason():
    (place,) = discover(seeded(ffn), (rand(5, H),), {})
    assert dense_reason(place).startswith("one expert that sees every token")

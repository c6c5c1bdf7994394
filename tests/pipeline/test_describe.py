"""A block in the words of a report."""

import pytest
import torch

import moeopt
from moeopt.find.discover import discover
from moeopt.pipeline import describe
from moeopt.pipeline.describe import dense_reason, describe_router
from moeopt.recognise.experts import recognize
from moeopt.recognise.router import recognize_router
from tests.capture.tiny import rand
from tests.recognise.test_experts import Hard, OnInput
from tests.recognise.test_router import Around
from tests.recognise.test_routing import EveryOne, Mask, MaskAlone, Sparse
from tests.recognise.tiny import GLU, H, MoE, ffn, seeded, tape_of
from tests.zoo import CASES


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
    for make, count in ((ffn, 2), (GLU, 3)):
        (place,) = discover(seeded(make), (rand(5, H),), {})
        assert dense_reason(place) == (
            f"left as it is: it is {count} matmuls over all tokens, and so is the op; dense='fuse' measures "
            "whether the op is quicker here"
        )


class PassedBy(torch.nn.Module):
    """Mixture of depths by a threshold: a norm and the FFN on some rows, the others pass by."""

    def __init__(self):
        super().__init__()
        self.norm, self.ffn = torch.nn.LayerNorm(H), ffn()

    def forward(self, x):
        taken = x[:, 0] > 0
        y = x.clone()
        y[taken] += self.ffn(self.norm(x[taken]))
        return y


def test_a_dense_ffn_of_picked_rows_is_not_said_to_see_all_tokens():
    (place,) = discover(seeded(PassedBy), (rand(5, H),), {})
    assert "2 matmuls over the rows that a mask picks" in dense_reason(place)


class HalfOfThem(PassedBy):
    """Mixture of depths by a capacity: the best half of the tokens, in their order."""

    def forward(self, x):
        at = x[:, 0].topk(len(x) // 2)[1].sort()[0][:, None].expand(-1, H)
        return x.scatter_add(0, at, self.ffn(x.gather(0, at)))


def test_a_dense_ffn_of_chosen_tokens_is_not_said_to_see_all_tokens():
    (place,) = discover(seeded(HalfOfThem), (rand(6, H),), {})
    assert "2 matmuls over the tokens that a topk picks for it (as in mixture of depths)" in dense_reason(place)


class OneLength(Around):
    """Runs on nine tokens only, as a decoder layer with its positions given does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.randn(9, H))

    def forward(self, x):
        return super().forward(x + self.positions)


@pytest.mark.parametrize(
    ("short", "words"), [(256, "softmax, top-2 of 4"), (8, "ids and weights given from outside, top-2 of 4")]
)
def test_a_module_that_takes_no_other_tokens_is_read_on_its_own_when_they_are_few(monkeypatch, short, words):
    monkeypatch.setattr(describe, "SHORT", short)
    (block,) = moeopt.optimize(seeded(OneLength), rand(9, H), verify="off").report.blocks
    assert block.status == "rewritten" and block.router == words
    assert bool(block.router_spec) == words.startswith("softmax")


def test_a_mask_from_outside_names_any_number_of_experts():
    found = CASES["router_outside_gives_a_mask_for_each_slot"]
    args, _ = found.inputs()
    (block,) = moeopt.explain(found.build(), args).blocks
    assert block.router == "a mask over 8 experts, given from outside" and block.top_k is None

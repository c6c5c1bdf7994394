"""Cases past the numbers in a block's code, without a token, and with columns that lie apart in memory."""

import torch

from moeopt.capture.call_roles import ArgRole, CallSpec
from moeopt.verification.size_cases import columns_in_memory, more_tokens_than, no_token, passable
from tests.verification.tiny import seeded

E, H = 4, 8
ROWS = CallSpec((seeded(5, H),), {}, (ArgRole("tokens", 1),))
SEQUENCES = CallSpec((seeded(2, 3, H), "eager"), {}, (ArgRole("tokens", 2), ArgRole()))


def test_which_numbers_a_case_passes():
    assert passable([], [], (H,), 1000) == passable([0, 1, 2, -7], [], (H,), 1000) == (0, None)
    assert passable([40, 300], [], (H,), 1000) == (300, None)
    assert passable([40, 600], [], (H,), 1000) == (75, 600), "600 tokens are too many, 600 elements are 75"
    assert passable([300], [300], (H,), 10**6) == (0, None), "300 is a size of its tensors"
    assert passable([30], [30], (H,), 10**6) == (30, None), "which a small case passes all the same"
    assert passable([9000, 7000], [], (10**9,), 10**9) == (0, 7000)
    assert passable([20], [], (H,), 1) == (20, None), "64 tokens run in every block"
    assert passable([128], [], (H,), 1) == (16, 128)
    assert passable([128], [128], (H,), 1) == (16, None), "a block of 128 experts, of which a case would take too long"
    assert passable([80_000], [], (H,), 10**6) == (0, 10_000), "80000 elements are 10000 tokens, which no case passes"
    assert passable([9000], [], (H, 2), 10**9) == (4500, 9000), "a token has two choices of experts"
    assert passable([60_000], [], (10**9, 2), 10**9) == (0, 30_000)


def test_tokens_past_a_number_and_half_of_them_alike():
    (case,) = more_tokens_than(ROWS, E, 40, "fast")
    assert case.name == "more tokens than 40, a number in its code" and case.args[0].shape == (82, H)
    assert case.args[0].unique(dim=0, return_counts=True)[1].max() > 40
    assert more_tokens_than(ROWS, E, 7, "fast") == more_tokens_than(ROWS, E, 260, "strict") == []
    assert len(more_tokens_than(ROWS, E, 261, "strict")) == 1


def test_sequences_come_as_one_and_as_many():
    one, many = more_tokens_than(SEQUENCES, E, 40, "fast")
    assert one.args[0].shape == (1, 82, H) and many.args[0].shape == (82, 1, H) and many.args[1] == "eager"
    assert many.name == f"{one.name}, in as many sequences"
    assert [c.args[0].shape for c in more_tokens_than(SEQUENCES, E, 40, "strict")] == [(82, 1, H)]


def test_no_token_and_columns():
    assert no_token(ROWS, E).args[0].shape == (0, H) and no_token(SEQUENCES, E).args[0].shape == (1, 0, H)
    for spec, rank in ((ROWS, 2), (SEQUENCES, 3)):
        x = columns_in_memory(spec, E).args[0]
        assert x.dim() == rank and x.shape[-2:] == (6, H) and x.stride()[-2:] == (1, 6)
        assert torch.equal(x.clone().stride() and x, x.contiguous())

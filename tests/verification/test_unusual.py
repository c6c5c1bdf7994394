"""Calls unlike the given one, of its sizes."""

import torch

from moeopt.verification.unusual import unusual_calls

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def test_rows_of_a_call_with_floats():
    calls = dict(unusual_calls(((X,), {"flag": True})))
    assert list(calls) == ["rows of zeros and tiny rows", "huge rows", "a row of NaN"]
    (scaled,), kwargs = calls["rows of zeros and tiny rows"]
    rows, own = scaled.reshape(-1, 4), X.reshape(-1, 4)
    assert kwargs == {"flag": True} and rows[1].eq(0).all() and torch.equal(rows[0], own[0])
    assert torch.allclose(rows[2], own[2] * 1e-5)
    assert torch.equal(calls["huge rows"][0][0], X * 1e3)
    broken = calls["a row of NaN"][0][0].isnan().any(-1)
    assert broken.sum() == 1 and broken[-1, -1]


def test_a_single_row_is_zero_and_float16_stays_in_its_range():
    (scaled,), _ = dict(unusual_calls(((X[:1, :1],), {})))["rows of zeros and tiny rows"]
    assert scaled.eq(0).all()
    (large,), _ = dict(unusual_calls(((X.half(),), {})))["huge rows"]
    assert large.isfinite().all()


def test_one_token_and_padding_of_a_language_model():
    ids, mask = torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.int64)
    ((what, (_, kwargs)),) = unusual_calls(((), {"input_ids": ids, "attention_mask": mask}))
    assert what == "one token repeated, half of it padding"
    assert kwargs["input_ids"].tolist() == [[0] * 5, [5] * 5]
    assert kwargs["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert mask.all() and unusual_calls(((ids[:, :1],), {})) == []
    ((what, (args, _)),) = unusual_calls(((ids,), {}))
    assert what == "one token repeated" and args[0].tolist() == [[0] * 5, [5] * 5]

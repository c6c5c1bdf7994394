"""Distances per token, and the pattern of what is finite."""

import math

import torch

from moeopt.verification.distance import features_last, finiteness, token_distance
from tests.verification.tiny import seeded


def test_relative_l2_per_row():
    o = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    y = o + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert torch.allclose(token_distance(y, o), torch.tensor([0.1, 0.0], dtype=torch.float64))


def test_any_rank():
    o = seeded(2, 3, 4, 5).double()
    assert token_distance(o.float(), o).shape == (24,)
    assert token_distance(o[0, 0, 0].float(), o[0, 0, 0]).shape == (1,)
    assert token_distance(o.sum().float(), o.sum()).shape == (1,)
    assert token_distance(o[:0].float(), o[:0]).shape == (0,)


def test_rows_without_digits_have_a_floor():
    o = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    y = o.clone()
    y[1, 0] = 1e-9
    d = token_distance(y, o, eps=2**-23)
    assert d[0] == 0 and math.isclose(float(d[1]), 1e-9 / (2**-23 * 0.5**0.5), rel_tol=1e-6)
    assert token_distance(y * 0, o * 0).tolist() == [0, 0]


def test_no_overflow_and_no_underflow():
    for scale in (1e300, 1e-300):
        o = torch.tensor([[3.0, 4.0]], dtype=torch.float64) * scale
        assert math.isclose(float(token_distance(o * 1.5, o)), 0.5, rel_tol=1e-12)


def test_rows_not_finite_have_no_distance():
    o = torch.ones(4, 2, dtype=torch.float64)
    y = o.clone()
    o[0, 0], y[1, 0] = math.nan, math.inf
    assert token_distance(y, o).isnan().tolist() == [True, True, False, False]


def test_finiteness():
    a, b = torch.ones(5, 2), torch.ones(5, 2)
    b[0, 0] = math.nan
    a[1, 0] = math.nan
    a[2, 1] = math.inf
    a[3, 1] = b[3, 0] = math.inf
    pattern = finiteness(a, b)
    assert pattern.leaked == [0] and pattern.healed_nan == [1] and pattern.healed_inf == [2]
    assert pattern.both.tolist() == [False, False, False, False, True]


def test_the_features_of_an_image_are_its_channels():
    y = seeded(2, 6, 3, 4)
    assert torch.equal(features_last(y, 6), y.permute(0, 2, 3, 1))
    for features in (None, 1, 4, 5):  # unknown, of no axis of its own, the last, none
        assert torch.equal(features_last(y, features), y)
    twice = seeded(6, 6, 3)
    assert torch.equal(features_last(twice, 6), twice) and features_last(y[0, :, :, 0], 6).shape == (6, 3)

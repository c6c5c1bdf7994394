"""Searched scales: never worse than the largest weight's, and about the best that there are."""

import pytest
import torch

from moeopt.errors import UsageError
from moeopt.ir import weight_format as wf
from moeopt.ops.quantize import quantize

FORMATS = [f for f in wf.FORMATS.values() if not f.is_float]
IDS = [f.name for f in FORMATS]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(held, w, format, squares=1.0):
    """The weighted squared error of each block, in float64."""
    gap = (held.dequantize(torch.float64) - w.double()).square() * squares
    (rows, columns), (down, across) = format.block, format.scale_shape(tuple(w.shape))
    rows, columns = rows or len(w), columns or w.shape[1]
    padded = torch.nn.functional.pad(gap, (0, across * columns - w.shape[1], 0, down * rows - len(w)))
    return padded.view(down, rows, across, columns).sum((1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 32), (130, 257), (1, 1), (3, 7), (9, 100)])
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_no_block_is_worse_than_to_nearest(format, shape, dtype):
    w = normal(*shape).to(dtype)
    plain, found = quantize(w, format), quantize(w, format, search=True)
    before, after = errors(plain, w, format), errors(found, w, format)
    assert bool((after <= before * (1 + 1e-12)).all())
    assert found.nbytes == plain.nbytes
    found.check("w")


@pytest.mark.parametrize(
    ("format", "saved"),
    [(wf.INT4_BLOCK32, 0.25), (wf.INT4_BLOCK128, 0.25), (wf.INT4_ASYMMETRIC32, 0.08), (wf.MXFP4, 0.05),
     (wf.NF4_BLOCK64, 0.1), (wf.INT8_CHANNEL, 0.01)],
    ids=lambda f: getattr(f, "name", ""),
)  # fmt: skip
def test_normal_weights_lose_less(format, saved):
    w = normal(64, 512)
    before, after = (errors(quantize(w, format, search=s), w, format).sum() for s in (False, True))
    assert after < (1 - saved) * before, float(after / before)


def test_it_is_near_the_best_of_all_scales():
    """Of a block of 32, over 8000 scales of both signs; bfloat16 scales are 0.4 % apart, so a hundredth is allowed."""
    w = normal(40, 32, seed=1)
    scales = torch.linspace(0.3, 1.3, 4000, dtype=torch.float64)
    scales = torch.cat([scales, -scales])[None, :, None] * (w.abs().amax(1) / 7)[:, None, None]
    codes = (w[:, None] / scales).round().clamp(-8, 7)
    best = (w[:, None] - scales * codes).square().sum(-1).amin(1)
    found = errors(quantize(w, wf.INT4_BLOCK32, search=True), w, wf.INT4_BLOCK32)[:, 0]
    assert bool((found >= best * (1 - 1e-3)).all())
    assert float((found / best).mean()) < 1.05 and float((found / best).max()) < 1.25


def test_the_code_without_a_positive_twin_is_used():
    w = torch.tensor([[8.0, 7, -7, 3, 0.0, 1, 2, 5]])
    found = quantize(w, wf.WeightFormat("four", "uint4", (1, 8)), search=True)
    assert torch.equal(found.dequantize(), w) and found.scales.item() == -1.0


def test_columns_count_by_their_mean_square():
    w = normal(16, 32)
    squares = torch.ones(32)
    squares[5] = 1e4
    found = quantize(w, wf.INT4_BLOCK32, search=True, squares_K=squares)
    plain = quantize(w, wf.INT4_BLOCK32, search=True)
    column = [(one.dequantize(torch.float64) - w)[:, 5].square().sum() for one in (found, plain)]
    assert column[0] < 0.1 * column[1]
    weighted = [errors(one, w, wf.INT4_BLOCK32, squares).sum() for one in (found, plain)]
    assert weighted[0] < weighted[1]


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_zeros_tiny_and_huge_weights(format):
    w = normal(6, 64).float()
    w[0], w[1], w[2, :32], w[3] = 0, w[1] * 1e-42, 0, w[3] * 1e35
    found = quantize(w, format, search=True)
    values = found.dequantize(torch.float64)
    assert bool(torch.isfinite(values).all()) and (format.block[0] != 1 or not values[0].any())
    zero = quantize(w, format, search=True, squares_K=torch.zeros(64))  # no row of the data had anything
    assert torch.equal(zero.dequantize(torch.float64), values)


@pytest.mark.parametrize(
    "squares", [torch.ones(31), torch.full((32,), torch.nan), -torch.ones(32), torch.full((32,), torch.inf)]
)
def test_mean_squares_that_are_none(squares):
    with pytest.raises(UsageError, match=r"the mean squares of the inputs of w_in of expert 3 are \(3[12],\), or hold"):
        quantize(normal(2, 32), wf.INT4_BLOCK32, "w_in of expert 3", search=True, squares_K=squares)

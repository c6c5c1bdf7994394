"""Each activation of the native kernel against float64, over the whole range of float32, special values included."""

import math

import pytest
import torch

from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts_reference
from moeopt.ops.native.selfcheck import ALPHA
from tests.ops.cases import FORMULAS

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-40, -1e-40, 88.8, -88.8, -104.0, 20.0, 20.1]


def through(kernel, values, activation, dtype=torch.float32):
    """``activation`` of each of ``values`` as the kernel computes it: one number a token, identity weights."""
    one = torch.ones(1, 1, 1, dtype=dtype)
    spec = ExpertsSpec(rows="plain", activation=activation, alpha=ALPHA.get(activation))
    ids = torch.zeros(len(values), 1, dtype=torch.int64)
    args = (
        values.to(dtype)[:, None],
        ids,
        torch.ones(len(values), 1, dtype=dtype),
        StackedExpertWeights([one], one),
        spec,
    )
    return kernel(*args)[:, 0], experts_reference(*args)[:, 0]


def grid():
    small, large = torch.linspace(-12, 12, 4001), torch.logspace(-30, 1.9, 500)
    return torch.cat([small, large, -large])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_close_to_float64(kernel, activation):
    x = grid()
    got, reference = through(kernel, x, activation)
    # torch's own formulas, in float64, for what cancels in those of the tests (elu, softplus near zero)
    _, want = through(lambda *args: experts_reference(*args), x, activation, torch.float64)
    assert (want - FORMULAS[activation](x.double(), ALPHA.get(activation))).abs().max() < 1e-9
    # 1 + erf, 1 - 2 / (...) and 1 + tanh cancel: absolute in the size of x there, as in torch's own float32
    error = (got.double() - want).abs() / (want.abs() + 0.5 * x.double().abs().clamp(max=4) + 1e-37)
    theirs = (reference.double() - want).abs() / (want.abs() + 0.5 * x.double().abs().clamp(max=4) + 1e-37)
    assert error.max() <= max(4 * 1.2e-7, 2 * theirs.max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_special_values(kernel, activation, dtype):
    x = torch.tensor(SPECIAL).to(dtype)
    got, _ = through(kernel, x, activation, dtype)
    # in float64, for torch's own gelu of an infinite float32 is a NaN on some CPUs; 16-bit matmuls flush subnormals
    want = through(lambda *args: experts_reference(*args), x, activation, torch.float64)[1].to(dtype)
    assert torch.equal(got.isnan(), want.isnan()), (got, want)
    assert torch.equal(got.isinf(), want.isinf()), (got, want)
    finite = want.isfinite()
    torch.testing.assert_close(
        got[finite], want[finite], rtol=4 * torch.finfo(dtype).eps, atol=1e-36
    )  # exp(88.8) is infinite


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_number_is_rounded_as_torch_rounds(kernel, dtype):
    """The identity through both products, and a float32 input through the rounding to 16 bits, all bit patterns."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    got, want = through(kernel, every, "identity", dtype)
    usual = every.isfinite() & (every.float().abs() >= torch.finfo(torch.bfloat16).tiny)
    assert torch.equal(got[usual], want[usual]) and torch.equal(got.isnan(), want.isnan())
    one = torch.ones(1, 1, 1)
    name = str(dtype).removeprefix("torch.")
    spec = ExpertsSpec(rows="plain", activation="identity", out_dtype=name)
    wide = every.float()
    between = torch.nextafter(wide, torch.tensor(math.inf)), torch.nextafter(wide, torch.tensor(-math.inf))
    for x in (wide, *between, wide * (1 + torch.finfo(dtype).eps / 2)):
        ids = torch.zeros(len(x), 1, dtype=torch.int64)
        y = kernel(x[:, None], ids, torch.ones(len(x), 1), StackedExpertWeights([one], one), spec)[:, 0]
        told = x.to(dtype)
        assert torch.equal(y.isnan(), told.isnan()) and torch.equal(y[~told.isnan()], told[~told.isnan()])

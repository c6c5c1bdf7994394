"""GPTQ: the codes of its definition, and products that are nearer to the floats' than those of any single rounding."""

import pytest
import torch

from moeopt.errors import UsageError
from moeopt.ir import weight_format as wf
from moeopt.ops.gptq import DAMPING, gptq
from moeopt.ops.nearest_codes import meant, nearest_codes
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_weight import scale_values

FORMATS = [
    wf.INT4_BLOCK32, wf.INT4_BLOCK128, wf.INT4_CHANNEL, wf.INT4_ASYMMETRIC32, wf.INT8_CHANNEL, wf.INT8_BLOCK32,
    wf.INT8_ASYMMETRIC32, wf.FP8_CHANNEL, wf.FP8_BLOCK128, wf.MXFP4, wf.NF4_BLOCK64,
    wf.WeightFormat("all", "uint4", (None, None)),
]  # fmt: skip
IDS = [f.name for f in FORMATS]


def made(N, K, rows=600, seed=0):
    """A weight and rows whose columns are correlated and of several sizes."""
    rng = torch.Generator().manual_seed(seed)
    w, mix = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((N, K), (K, K)))
    x = torch.randn(rows, K, generator=rng, dtype=torch.float64) @ (torch.eye(K) + 2 * mix / K**0.5)
    return w, x * torch.linspace(0.3, 3, K, dtype=torch.float64)


def by_definition(w, format, hessian):
    """Optimal brain quantisation in a fixed order: the inverse of what is left of H is made anew for each column.

    With column k rounded, the columns F that are left move by ``- (w_k - q_k) (H_kk^-1)^-1 (H^-1)_{F,k}``.
    """
    start = quantize(w, format, search=True, squares_K=hessian.diagonal())
    scales = scale_values(start.scales, format, torch.float64)
    N, K = w.shape
    rows = torch.arange(N) // (format.block[0] or N)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(K)
    left, out = w.clone(), torch.empty_like(w)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    for at, k in enumerate(order.tolist()):
        rest = order[at:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        column = k // (format.block[1] or K)
        scale = scales[rows, column]
        zero = None if start.zeros is None else start.zeros[rows, column].double()
        out[:, k] = scale * meant(nearest_codes(left[:, k] / scale, format, zero, whole=True), format, zero)
        left[:, rest] -= ((left[:, k] - out[:, k]) / inverse[0, 0])[:, None] * inverse[0][None]
    return out


@pytest.mark.parametrize("shape", [(4, 40), (7, 33), (2, 150)])
@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_the_codes_are_those_of_the_definition(format, shape):
    w, x = made(*shape)
    found = gptq(w, format, x.T @ x)
    assert torch.equal(found.dequantize(torch.float64), by_definition(w, format, x.T @ x))


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_inputs_that_know_nothing_of_each_other_are_rounded_to_nearest(format):
    w, _ = made(9, 70)
    squares = torch.linspace(1, 3, 70)
    found, plain = gptq(w, format, squares.diag()), quantize(w, format, search=True, squares_K=squares)
    for part in ("codes", "scales", "zeros"):
        a, b = getattr(found, part), getattr(plain, part)
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)), part


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_products_are_nearer_on_other_rows_too(format):
    w, x = made(48, 192, rows=2400)
    seen, other = x[:1200], x[1200:]
    found = gptq(w.float(), format, seen.T @ seen)
    plain = quantize(w.float(), format, search=True, squares_K=seen.square().mean(0))

    def error(held, rows):
        return float((rows @ (held.dequantize(torch.float64) - w).T).norm() / (rows @ w.T).norm())

    assert found.format == plain.format and found.nbytes == plain.nbytes
    for rows in (seen, other):
        assert error(found, rows) < 0.75 * error(plain, rows), (error(found, rows), error(plain, rows))
    found.check("w")


def test_the_hessian_stays_as_it_was():
    w, x = made(4, 40)
    hessian = x.T @ x
    before = hessian.clone()
    gptq(w, wf.INT4_BLOCK32, hessian)
    assert torch.equal(hessian, before)


def test_fewer_rows_than_inputs_and_none_at_all():
    w, x = made(6, 64, rows=10)
    x[:, 7] = 0  # and an input that is never there
    found = gptq(w, wf.INT4_BLOCK32, x.T @ x)
    assert bool(torch.isfinite(found.dequantize()).all())
    nothing = gptq(w, wf.INT4_BLOCK32, torch.zeros(64, 64))
    assert torch.equal(nothing.codes, quantize(w, wf.INT4_BLOCK32, search=True).codes)


@pytest.mark.parametrize("hessian", [torch.eye(63), torch.full((64, 64), torch.nan)])
def test_hessians_that_are_none(hessian):
    with pytest.raises(UsageError, match=r"the Hessian of w_out of expert 2 is \(6[34], 6[34]\), or holds NaN"):
        gptq(made(6, 64)[0], wf.INT4_BLOCK32, hessian, "w_out of expert 2")


def test_rows_of_any_size_round_alike():
    w, x = made(6, 64)
    want = gptq(w, wf.INT4_BLOCK32, x.double().T @ x.double())
    for size in (2.0**-530, 2.0**500):  # squares that are hardly numbers any more
        rows = x.double() * size
        assert torch.equal(gptq(w, wf.INT4_BLOCK32, rows.T @ rows).codes, want.codes)


def test_a_hessian_of_no_rows_is_told():
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(UsageError, match=r"w_in_0 of expert 1 has eigenvalues far below 0; it must be a sum of x x\^T"):
        gptq(made(6, 64)[0], wf.INT4_BLOCK32, hessian, "w_in_0 of expert 1")


def test_weights_that_no_code_means():
    with pytest.raises(UsageError, match="w holds NaN or infinity"):
        gptq(torch.full((2, 32), torch.nan), wf.INT4_BLOCK32, torch.eye(32), "w")

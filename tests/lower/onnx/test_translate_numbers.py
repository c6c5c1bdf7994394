"""Arithmetic of integers past 2^24 and 2^53, of rows that overflow, of NaN: as in PyTorch."""

import math

import pytest
import torch

pytest.importorskip("onnxruntime")

from moeopt.errors import NotSaveableError
from tests.lower.onnx.emitted import graph_of, session_of, together

INTEGERS = {
    "trunc": lambda i: torch.div(i, 7, rounding_mode="trunc"),
    "trunc by a tensor": lambda i: torch.div(i, i % 5 + 1, rounding_mode="trunc"),
    "floor": lambda i: i // 7,
    "floor by a negative": lambda i: torch.div(i, -7, rounding_mode="floor"),
    "mod": lambda i: i % 7,
    "mod of a negative": lambda i: torch.remainder(i, -7),
    "sum": lambda i: i.sum(-1),
    "sum, kept": lambda i: i.sum(0, keepdim=True),
    "sum of all": lambda i: i.sum(),
    "sum of flags": lambda i: (i > 0).sum(-1),
    "sum of small ones": lambda i: (i % 5).to(torch.int32).sum(-1),
    "prod": lambda i: i.reshape(-1, 4).prod(-1),
    "clamp": lambda i: i.clamp(-(2**60), 2**53 + 1),
    "cumsum": lambda i: i.cumsum(-1),
}


def test_integers_of_every_size():
    g = torch.Generator().manual_seed(0)
    i = torch.cat([torch.randint(-(2**bits), 2**bits, (9, 4), generator=g) for bits in (3, 12, 25, 33, 53, 61)])
    i = torch.cat([i, torch.tensor([[306783378 * 7, -306783378 * 7, 2**53 + 1, 1]])])
    session = session_of(together(INTEGERS.values()), i[:5])
    for part in (i, i[:1]):
        for (name, f), got in zip(INTEGERS.items(), session.run({"x": part}), strict=True):
            want = f(part)
            assert got.dtype == want.dtype and torch.equal(got, want), name


POWERS = {
    "0": lambda i: i**0,
    "1": lambda i: i**1,
    "2": lambda i: i**2,
    "5": lambda i: i**5,
    "8": lambda i: i**8,
    "13": lambda i: i**13,
    "of a tensor": lambda i: i ** (i.flip(-1) % 100),
    "of any tensor": lambda i: i ** i.flip(-1),
    "of a number": lambda i: 3 ** (i % 100),
    "of a number, any": lambda i: 3**i,
    "of a negative": lambda i: (-3) ** (i % 41),
    "of one": lambda i: 1**i,
    "of two by flags": lambda i: 2 ** (i > 0),
    "product": lambda i: i.reshape(-1, 4).prod(-1, dtype=i.dtype),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_powers_of_integers_wrap_around(dtype):
    info = torch.iinfo(dtype)
    g = torch.Generator().manual_seed(0)
    i = torch.randint(info.min, info.max, (9, 4), generator=g, dtype=dtype)
    ends = torch.tensor([[info.max, info.min, 1, 0], [info.max // 2 + 1, -1 if info.min else 3, 7, 2]], dtype=dtype)
    i = torch.cat([i, ends, i % 7])
    session = session_of(together(POWERS.values()), i[:5])
    for (name, f), got in zip(POWERS.items(), session.run({"x": i}), strict=True):
        want = f(i)
        assert got.dtype == want.dtype and torch.equal(got, want), name


def test_a_product_of_too_many_integers_is_refused():
    with pytest.raises(NotSaveableError, match="a product of 70 integers has no form in ONNX that is exact"):
        graph_of(lambda i: i.reshape(-1, 70).prod(-1), torch.ones(3, 70, dtype=torch.int64))
    with pytest.raises(NotSaveableError, match="a product of an unknown number of integers"):
        graph_of(lambda i: i.prod(-1), torch.ones(3, 70, dtype=torch.int64))


ROWS = {
    "std": lambda x: x.std(-1),
    "std, biased, kept": lambda x: x.std(-1, unbiased=False, keepdim=True),
    "std of all": lambda x: x.std(),
    "largest": lambda x: x.max(),
    "least": lambda x: x.min(),
    "norm": lambda x: x.norm(dim=-1),
    "norm of order 1": lambda x: x.norm(p=1, dim=-1),
    "norm of order 3": lambda x: x.norm(p=3, dim=-1),
    "largest norm": lambda x: torch.linalg.vector_norm(x, math.inf, dim=-1),
    "how many": lambda x: torch.linalg.vector_norm(x, 0, dim=-1),
    "normalised": lambda x: torch.nn.functional.normalize(x, dim=-1),
    "logsumexp": lambda x: x.logsumexp(-1),
}


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e10, 1e25], ids=str)
def test_rows_of_every_scale_and_rows_with_nan(scale):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * scale
    broken = x.clone()
    broken[1, 5], broken[2, 3] = math.nan, math.inf
    session = session_of(together(ROWS.values()), x[:3])
    for part in (x, broken, x * 0):
        for (name, f), got in zip(ROWS.items(), session.run({"x": part}), strict=True):
            assert torch.allclose(got, f(part), rtol=1e-5, atol=0, equal_nan=True), name


def test_floor_division_of_infinity_and_by_zero():
    def f(x):
        return x // 3, x // 0.0, x % 3, torch.div(3.0, x, rounding_mode="floor")

    x = torch.tensor([math.inf, -math.inf, math.nan, 1e20, -1e20, 7.5, -7.5, 0.0, -0.3])
    for got, want in zip(session_of(f, torch.randn(3)).run({"x": x}), f(x), strict=True):
        assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))


def test_logaddexp_beyond_the_range_of_exp():
    def f(x):
        return torch.logaddexp(x, x + 1), torch.logaddexp(x, -x)

    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0, math.inf, -math.inf, math.nan])
    for got, want in zip(session_of(f, torch.randn(3)).run({"x": x}), f(x), strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_beside_16_bits_are_read_as_pytorch_reads_them(dtype):
    def f(x):
        return x < 1e-9, x >= 1.0003, x * 1e-9, x / 1e-9

    x = torch.tensor([0.0, -0.0, 3e-5, 1.0, 2.0, 3e4], dtype=dtype)
    for got, want in zip(session_of(f, x[:3]).run({"x": x}), f(x), strict=True):
        assert got.dtype == want.dtype
        if got.dtype == torch.bool:
            assert torch.equal(got, want)
        else:
            assert torch.allclose(got.float(), want.float(), rtol=2e-2, atol=1e-7)


SIGNS = {
    "signbit": torch.signbit,
    "signbit of integers": lambda x: torch.signbit(x.clamp(-9, 9).nan_to_num().to(torch.int64)),
    "signbit of flags": lambda x: torch.signbit(x > 0),
    "copysign": lambda x: torch.copysign(x, x.flip(-1)),
    "copysign of a number": lambda x: torch.copysign(x, -0.0),
    "atan2": lambda x: torch.atan2(x, x.flip(-1)),
    "atan2 of what is 0 or more": lambda x: torch.atan2(x.relu(), x),
    "angle of a real": lambda x: torch.atan2(torch.zeros_like(x), x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ops_that_look_at_the_sign_of_a_zero(dtype):
    inf, least = float("inf"), torch.finfo(dtype).tiny
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, least, -least, 3e4, -3e4, 0.3, math.nan], dtype=dtype)
    x = torch.cartesian_prod(values, values)
    without = ("atan2", "angle") if dtype == torch.float64 else ()  # ONNX Runtime has no Atan of float64
    functions = {name: f for name, f in SIGNS.items() if not without or not name.startswith(without)}
    session = session_of(together(functions.values()), x[:5])
    for (name, f), got in zip(functions.items(), session.run({"x": x}), strict=True):
        want = f(x)
        assert got.dtype == want.dtype, name
        if want.is_floating_point():
            torch.testing.assert_close(got, want, rtol=2e-7 if dtype != torch.float16 else 1e-3, atol=0, equal_nan=True)
            real = ~want.isnan()
            assert torch.equal(got[real].signbit(), want[real].signbit()), name
        else:
            assert torch.equal(got, want), name

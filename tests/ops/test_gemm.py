"""Every spelling of an expert's matrix product gives the same product."""

import pytest
import torch
import torch.nn.functional as F

from moeopt.ops.kernels import gemm


def operands(rows, dtype, row_major, bias):
    g = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(*s, generator=g).to(dtype) for s in ((rows, 64), (48, 64), (48,)))
    return x, w if row_major else w.t().contiguous().t(), b if bias else None


def close(got, x, w, b):
    want = F.linear(x.double(), w.double(), None if b is None else b.double())
    # the result's own rounding, plus float32 accumulation of 64 products of size ~1
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=max(2 * eps, 64 * 1.2e-7 * 4))


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("row_major", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("rows", (1, 2, 5, 30, 70))
def test_linear_is_linear(rows, dtype, row_major, bias):
    x, w, b = operands(rows, dtype, row_major, bias)
    got = gemm.linear(x, w, b)
    assert got.dtype == dtype and got.shape == (rows, 48)
    close(got, x, w, b)


@pytest.mark.parametrize("kind", ("mv", "linear", "mm_t", "onednn"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bias", (False, True))
def test_every_spelling(kind, dtype, bias, monkeypatch):
    """Where this CPU has no oneDNN kernel for a dtype, what is used in its place is held to the same."""
    monkeypatch.setattr(gemm, "choose_gemm", lambda *_: kind)
    x, w, b = operands(1 if kind == "mv" else 6, dtype, True, bias)
    close(gemm.linear(x, w, b), x, w, b)


def test_a_cpu_with_bfloat16_kernels_is_seen_as_one():
    assert gemm.onednn_linear_works(torch.bfloat16) or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    ("rows", "dtype", "row_major", "kind"),
    [
        (1, torch.float32, True, "linear"),
        (3, torch.float32, True, "linear"),
        (4, torch.float32, True, "mm_t"),
        (48, torch.float32, True, "mm_t"),
        (49, torch.float32, True, "linear"),
        (1, torch.float32, False, "linear"),
        (1, torch.bfloat16, True, "mv"),
        (300, torch.bfloat16, True, "mm_t"),
        (1, torch.bfloat16, False, "onednn"),
        (65, torch.bfloat16, False, "linear"),
        (9, torch.float16, True, "linear"),
        (9, torch.float64, True, "linear"),
    ],
)
def test_the_choice(rows, dtype, row_major, kind):
    assert gemm.choose_gemm(rows, dtype, row_major, elements=7168 * 1024) == kind


def test_a_small_float32_weight_is_left_to_linear():
    assert gemm.choose_gemm(8, torch.float32, True, elements=768 * 512) == "linear"
    assert gemm.choose_gemm(8, torch.bfloat16, True, elements=768 * 512) == "mm_t"


@pytest.fixture
def fresh_self_test():
    gemm.onednn_linear_works.cache_clear()
    yield
    gemm.onednn_linear_works.cache_clear()


def test_a_wrong_or_missing_private_op_is_not_used(monkeypatch, fresh_self_test):
    x, w, b = operands(3, torch.bfloat16, False, True)

    def refuses(*_):
        raise RuntimeError("another schema")

    for fake in (refuses, lambda x, w, b, *_: F.linear(x, w, b) * 1.1):
        gemm.onednn_linear_works.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fake, raising=False)
        assert not gemm.onednn_linear_works(torch.bfloat16)
        close(gemm.linear(x, w, b), x, w, b)

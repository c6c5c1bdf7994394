"""Every spelling of an expert's matmul gives the same product."""

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


@pytest.fixture
def asked(monkeypatch):
    """The questions that were measured; each is answered by the last way that works here."""
    seen = []

    def last(question, ways, default):
        found = ways()
        assert default in found
        for way in found.values():
            way()
        seen.append(question)
        return list(found)[-1]

    monkeypatch.setattr(gemm, "fastest", last)
    for cached in (gemm._choose, gemm._filled):
        cached.cache_clear()
    yield seen
    for cached in (gemm._choose, gemm._filled):
        cached.cache_clear()


def test_rows_dtype_layout_and_size_are_measured_by_powers_of_two(asked):
    for rows in (3, 4, 1000, 300):
        gemm.choose_gemm(rows, torch.float32, True, elements=7168 * 1024)
    gemm.choose_gemm(4, torch.float32, True, elements=768 * 512)
    gemm.choose_gemm(4, torch.float32, False, elements=7168 * 1024)
    assert asked == [
        "product of 4 rows, float32, W in rows, large",
        "product of 256 rows, float32, W in rows, large",
        "product of 4 rows, float32, W in rows, small",
        "product of 4 rows, float32, W in columns, large",
    ]


def test_one_row_has_a_spelling_of_its_own_and_float64_none(asked):
    if not gemm.onednn_linear_works(torch.bfloat16):
        assert gemm.choose_gemm(1, torch.bfloat16, True, 1) == "mv"
    assert gemm.choose_gemm(9, torch.float64, True, elements=1) == "linear"
    assert "float64" not in "".join(asked)


def test_without_measurements_every_product_is_linear_and_no_row_is_added(monkeypatch):
    monkeypatch.setenv("MOEOPT_MEASURE", "off")
    for cached in (gemm._choose, gemm._filled):
        cached.cache_clear()
    for rows in (1, 2, 16, 300):
        assert gemm.choose_gemm(rows, torch.bfloat16, True, elements=7168 * 1024) == "linear"
        assert not gemm.pays_to_fill(rows, torch.bfloat16)


def test_filling_is_measured_with_the_chosen_spelling(asked):
    assert gemm.pays_to_fill(48, torch.bfloat16)
    assert asked[-1] == "filling up to 32 rows, bfloat16"
    assert any(question.startswith("product of 32 rows") for question in asked)


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

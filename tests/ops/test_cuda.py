"""The CUDA kernel's choice and arithmetic, without a GPU; and on one, where there is one."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts, experts_reference
from moeopt.ops.kernels.cuda import choose_cuda_path, experts_grouped
from tests.ops.cases import cases, coarsest_eps, make, naive

GOOD = dict(
    capability=(8, 0),
    dtype=torch.bfloat16,
    shapes=[(4, 64, 32), (4, 32, 32)],
    strides=[(2048, 32, 1), (1024, 1, 32)],
    has_grouped_mm=True,
)


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({}, "grouped", "16-byte strides"),
        ({"capability": (9, 0), "dtype": torch.float16}, "grouped", "16-byte strides"),
        ({"capability": (7, 5)}, "loop", "this device has 7.5"),
        ({"has_grouped_mm": False}, "loop", "has no torch.nn.functional.grouped_mm"),
        ({"dtype": torch.float32}, "loop", "the compute dtype is torch.float32"),
        ({"shapes": [], "strides": []}, "loop", "the experts are separate tensors"),
        ({"strides": [(2048, 32, 1), (1020, 1, 30)]}, "loop", "16-byte steps"),
        ({"strides": [(4096, 64, 2), (1024, 1, 32)]}, "loop", "one inner stride of 1"),
    ],
)
def test_the_choice(change, path, reason):
    got_path, got_reason = choose_cuda_path(**{**GOOD, **change})
    assert got_path == path and reason in got_reason


def grouped_mm_leaving_garbage(a, w, offs):
    """A grouped_mm that, as the CUDA kernel may, leaves rows past the last offset unwritten: NaN here."""
    y = torch.full((a.shape[0], w.shape[2]), torch.nan, dtype=a.dtype)
    start = 0
    for e, end in enumerate(offs.tolist()):
        y[start:end] = a[start:end] @ w[e]
        start = end
    return y


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_grouped_arithmetic_is_the_reference(case):
    if case.bank.stacked() is None:
        return
    got = experts_grouped(*case.args, grouped_mm=grouped_mm_leaving_garbage)
    want = experts_reference(*case.args)
    # as in test_cpu: a few float64 roundings of the terms
    assert (got - want).abs().le(16 * coarsest_eps(case) * (naive(case)[1] + 1)).all()


def test_torch_s_own_grouped_mm():
    case = make(ExpertsSpec(), T=9, E=4, K=2, dtype=torch.float32, biases=False, strange_ids=True)
    # K = 6 is no multiple of 16 bytes, so pad the widths as a real model has them
    g = torch.Generator().manual_seed(0)
    bank = StackedExpertWeights([torch.randn(4, 32, 16, generator=g)], torch.randn(4, 16, 16, generator=g))
    x = torch.randn(9, 16, generator=g)
    got = experts_grouped(x, case.ids, case.weights, bank, case.spec)
    want = experts_reference(x, case.ids, case.weights, bank, case.spec)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32 sums of 16 terms of size up to 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rows", ("gate|up", "separate"))
@pytest.mark.parametrize("layout", ("oi", "io"))
def test_on_a_gpu(dtype, rows, layout):
    spec = ExpertsSpec(rows=rows, w_in_layout=layout, w_out_layout=layout, out_of_range="nothing")
    g = torch.Generator().manual_seed(0)

    def weight(out, into):
        w = torch.randn(8, out, into, generator=g) / into**0.5
        return (w if layout == "oi" else w.transpose(1, 2).contiguous()).to("cuda", dtype)

    bank = StackedExpertWeights([weight(128, 64)] if rows != "separate" else [weight(64, 64)] * 2, weight(64, 64))
    ids = torch.randint(-1, 10, (33, 4), generator=g).cuda()
    x, weights = torch.randn(33, 64, generator=g).to("cuda", dtype), torch.rand(33, 4, generator=g).to("cuda", dtype)
    with torch.no_grad():
        got = experts(x, ids, weights, bank, spec).double()
        wide = StackedExpertWeights([w.double() for w in bank.w_in_s], bank.w_out_s.double())
        want = experts_reference(x.double(), ids, weights.double(), wide, dataclasses.replace(spec))
    eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps  # float32 GEMMs may run in TF32
    assert (got - want).norm() <= 4 * eps * want.norm()

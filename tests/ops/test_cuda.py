"""The CUDA kernel's choice and arithmetic, without a GPU; and on one, where there is one."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts, experts_reference
from moeopt.ops.kernels import cuda
from moeopt.ops.kernels.counted import Launches, launches_of, one_launch
from moeopt.ops.kernels.cuda import choose_cuda_path, experts_grouped, experts_loop
from tests.ops.cases import cases, coarsest_eps, make, naive

GOOD = dict(
    capability=(9, 0),
    dtype=torch.bfloat16,
    shapes=[(4, 64, 32), (4, 32, 32)],
    strides=[(2048, 32, 1), (1024, 1, 32)],
    has_grouped_mm=True,
    no_triton="triton is not installed",
)


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"no_triton": ""}, "triton", "no wait for the host"),
        ({"no_triton": "", "kernels": (4, 5)}, "triton", "4 launches for up to 32 pairs of token and expert, 5 for"),
        ({"dtype": torch.float16}, "loop", "a loop over the experts that are hit, which no CUDA graph can hold"),
        ({}, "grouped", "grouped_mm, no wait for the host; triton is not installed"),
        ({"capability": (10, 0)}, "grouped", "grouped_mm"),
        ({"dtype": torch.float16}, "loop", "this is float16 on 9.0"),
        ({"capability": (8, 0)}, "loop", "this is bfloat16 on 8.0"),
        ({"capability": (8, 9)}, "loop", "one wait for the host: triton is not installed; grouped_mm is one launch in"),
        ({"has_grouped_mm": False}, "loop", "has no torch.nn.functional.grouped_mm"),
        ({"dtype": torch.float32}, "loop", "this is float32 on 9.0"),
        ({"shapes": [], "strides": []}, "loop", "these are separate or cast"),
        ({"strides": [(2048, 32, 1), (1020, 1, 30)]}, "loop", "16-byte steps"),
        ({"strides": [(4096, 64, 2), (1024, 1, 32)]}, "loop", "one inner stride of 1"),
    ],
)
def test_the_choice(change, path, reason):
    got_path, got_reason = choose_cuda_path(**{**GOOD, **change})
    assert got_path == path and reason in got_reason


@pytest.mark.parametrize(
    ("stacked", "no_triton", "path", "reason"),
    [
        (False, "", "triton", "no wait for the host"),
        (False, "triton is not installed", "loop", "triton is not installed; grouped_mm takes one stack"),
        (True, "triton is not installed", "loop", "this is float32 on 9.0"),
    ],
)
def test_the_report_s_words_are_the_path_of_the_weights(stacked, no_triton, path, reason, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda device: no_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton", reason="triton is not installed here")
    case = make(ExpertsSpec(rows="separate"), dtype=torch.float32, stacked=stacked)
    got_path, got_reason = cuda.describe_path(case.bank, case.spec)
    assert got_path == path and reason in got_reason


@pytest.mark.parametrize("biases", (False, True))
@pytest.mark.parametrize(
    "spec",
    (
        ExpertsSpec(),
        ExpertsSpec(rows="separate", combine="expert", w_in_layout="io", out_norm_eps=1e-6),
        ExpertsSpec(rows="plain", activation="relu", weight_on="input", out_of_range="identity"),
    ),
)
def test_the_report_counts_the_launches_of_the_paths_without_kernels_of_our_own(spec, biases, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda device: "no Triton")
    case = make(spec, T=40, E=6, K=3, dtype=torch.bfloat16, biases=biases)
    case.ids = torch.arange(40)[:, None] * 3 % 5 + torch.arange(3)[None] % 2  # all six are hit
    for capability, path, run, more in (
        ((9, 0), "grouped", experts_grouped, {"grouped_mm": one_launch}),
        ((8, 0), "loop", experts_loop, {}),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        monkeypatch.setattr(cuda, "_no_grouped", lambda *args, of=path: "" if of == "grouped" else "no grouped_mm")
        taken, reason = cuda.describe_path(case.bank, case.spec)
        assert taken == path
        fixed, *each = map(int, re.findall(r"(\d+) (?:launches|for each expert (?:that is hit|more))", reason))
        told = fixed + (6 * each[0] if path == "loop" else 0) + 2 * each[-1]
        with Launches() as counted:
            run(*case.args, **more)
        assert counted.started == told and len(each) == (2 if path == "loop" else 1), reason


def test_launches_that_this_cpu_can_not_count_are_left_out():
    bank = StackedExpertWeights([torch.zeros(2, 16, 8).to(torch.float8_e4m3fn)], torch.zeros(2, 8, 8).half())
    assert launches_of(experts_loop, bank, ExpertsSpec()) is not None
    bank.w_out_s = bank.w_out_s.to(torch.float8_e4m3fn)
    assert launches_of(experts_loop, bank, ExpertsSpec()) is None


def test_the_report_promises_no_cuda_graph_for_weights_that_each_call_copies(monkeypatch):
    """As where an expert's neurons are picked from an FFN."""
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton", reason="triton is not installed here")
    case = make(ExpertsSpec(rows="separate"), dtype=torch.float32, stacked=False)
    _, held = cuda.describe_path(case.bank, case.spec)
    assert "no wait for the host, fit for a CUDA graph" in held
    w_out = type(case.bank).w_out
    monkeypatch.setattr(type(case.bank), "w_out", lambda bank, e: w_out(bank, e).clone())
    path, copied = cuda.describe_path(case.bank, case.spec)
    assert path == "triton" and "copies of the experts' weights at each call, for which the host waits" in copied
    assert "no CUDA graph can hold them" in copied and "fit for a CUDA graph" not in copied


def test_the_report_says_why_the_better_kernel_does_not_take_the_weights(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton", reason="triton is not installed here")
    case = make(ExpertsSpec(rows="separate", accum_dtype="float64"), dtype=torch.float32, stacked=False)
    path, reason = cuda.describe_path(case.bank, case.spec)
    assert path == "loop" and "the accumulator dtype is float64; the kernels have 16 and 32 bits" in reason


def test_the_report_tells_what_triton_refused_before(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pytest.importorskip("triton", reason="triton is not installed here")
    from moeopt.ops.triton import launch
    from moeopt.ops.triton.addresses import weights_of

    case = make(ExpertsSpec(rows="separate"), dtype=torch.float32, stacked=False)
    device, H = case.x.device, case.x.shape[1]
    call = case.spec, torch.float32, torch.float32, weights_of(case.bank, case.spec, H, device).held, device
    monkeypatch.setitem(launch._refused, call, "Triton does not compile them")
    path, reason = cuda.describe_path(case.bank, case.spec)
    assert path == "loop" and "one wait for the host: Triton does not compile them; grouped_mm takes" in reason


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


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_the_loop_is_the_reference(case):
    got, want = experts_loop(*case.args), experts_reference(*case.args)
    # as in test_cpu: a few float64 roundings of the terms
    assert (got - want).abs().le(16 * coarsest_eps(case) * (naive(case)[1] + 1)).all()


def own_loop(x, ids, weights, bank):
    """The loop that most home-made blocks and transformers' eager experts run."""
    y = torch.zeros_like(x)
    for e in ids.unique():
        slot, token = torch.where(ids.t() == e)
        gate, up = (F.linear(x[token], w) for w in bank.w_in(e))
        o = F.linear(F.silu(gate) * up, bank.w_out(e)) * weights[token, slot, None]
        y.index_add_(0, token, o.to(y.dtype))
    return y


@pytest.mark.parametrize("combine", ("slot", "expert"))
@pytest.mark.parametrize(("E", "K", "T"), [(16, 4, 512), (128, 8, 512), (128, 8, 1), (8, 2, 64), (8, 2, 1)])
def test_the_loop_launches_no_more_than_the_model_s_own(E, K, T, combine):
    g = torch.Generator().manual_seed(0)
    w_in = [[torch.randn(8, 8, generator=g) for _ in range(E)] for _ in range(2)]
    bank = ListExpertWeights(w_in, [torch.randn(8, 8, generator=g) for _ in range(E)])
    x, weights = torch.randn(T, 8, generator=g), torch.rand(T, K, generator=g)
    ids = torch.rand(T, E, generator=g).topk(K).indices
    with torch.no_grad(), Launches() as own:
        want = own_loop(x, ids, weights, bank)
    with Launches() as ours:
        got = experts_loop(x, ids, weights, bank, ExpertsSpec(rows="separate", combine=combine))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32 sums of at most 8 terms of size 100
    assert ours.started <= own.started and ours.waits <= own.waits


@pytest.mark.parametrize("path", (experts_grouped, experts_loop))
def test_as_many_experts_as_the_dtype_of_ids_has_numbers(path):
    case = make(ExpertsSpec(), T=40, E=128, K=2, dtype=torch.float64)
    case.ids[0], case.ids[1] = torch.tensor([127, -1]), torch.tensor([0, 127])
    more = {"grouped_mm": grouped_mm_leaving_garbage} if path is experts_grouped else {}
    got = path(case.x, case.ids.to(torch.int8), case.weights, case.bank, case.spec, **more)
    torch.testing.assert_close(got, experts_reference(*case.args))


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

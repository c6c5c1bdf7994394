"""The CPU kernel is the reference, only faster."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts_reference
from moeopt.ops.kernels import cpu
from moeopt.ops.kernels.cpu import experts_cpu
from tests.ops.cases import cases, coarsest_eps, make, naive

MANY = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def agree(case):
    got, want = experts_cpu(*case.args), experts_reference(*case.args)
    assert got.dtype == want.dtype and got.shape == want.shape
    if not want.isfinite().all():
        assert torch.equal(got.isfinite(), want.isfinite())
        return
    _, size = naive(case)
    # the two differ only in how a GEMM orders its sum; each such difference is one rounding of a stage in its
    # dtype, there are at most 8 stages, and the activation's slope (below 2 here, clamps aside) may double it
    assert (got.double() - want.double()).abs().le(16 * coarsest_eps(case) * (size + 1)).all()


@MANY
@given(cases())
def test_equals_the_reference_in_float64(case):
    agree(case)


@MANY
@given(cases(dtypes=True))
def test_equals_the_reference_in_mixed_dtypes(case):
    agree(case)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", ("oi", "io"))
@pytest.mark.parametrize("T", (1, 2, 12, 150))
def test_every_row_count_and_layout(T, layout, dtype):
    agree(make(ExpertsSpec(w_in_layout=layout, w_out_layout=layout), T=T, E=3, K=2, dtype=dtype, seed=T))


@pytest.mark.parametrize(
    "spec", (ExpertsSpec(rows="separate", out_norm_eps=0.01), ExpertsSpec(weight_on="input")), ids=str
)
@pytest.mark.parametrize("few", (0, 10**9))
@pytest.mark.parametrize("fill", (False, True))
def test_both_ways_through_the_experts(few, spec, fill, monkeypatch):
    monkeypatch.setattr(cpu, "FEW_ROWS", few)
    monkeypatch.setattr(cpu, "pays_to_fill", lambda *_: fill)
    for dtype in (torch.float32, torch.bfloat16):
        agree(make(spec, T=30, E=3, K=2, dtype=dtype, strange_ids=True, seed=2))


@pytest.mark.parametrize("T", (9, 33, 60))
def test_rows_that_fill_a_tile_do_not_leak(T, monkeypatch):
    monkeypatch.setattr(cpu, "pays_to_fill", lambda *_: True)
    case = make(ExpertsSpec(), T=T, E=2, K=1, dtype=torch.bfloat16)
    case.ids[:] = (torch.arange(T) >= T // 2 + 3)[:, None]
    clean = experts_cpu(*case.args)
    agree(case)
    case.x[case.ids[:, 0] == 1] = torch.nan
    dirty = experts_cpu(*case.args)
    assert torch.equal(dirty[case.ids[:, 0] == 0], clean[case.ids[:, 0] == 0])


def test_a_dense_block_is_one_expert():
    case = make(ExpertsSpec(), T=20, E=1, K=1, dtype=torch.float32)
    agree(case)
    case.ids[3] = 1
    agree(case)


@pytest.mark.parametrize("combine", ("slot", "expert"))
@pytest.mark.parametrize("T", (1, 5))
def test_the_sum_s_order_is_exact(T, combine):
    """Exact products (identity weights, powers of two), so only the order of a bfloat16 sum can differ."""
    E, K = 6, 5
    generator = torch.Generator().manual_seed(T)
    eye = torch.eye(8, dtype=torch.bfloat16)
    scales = (2.0 ** torch.arange(-4, 8, 2)) * torch.tensor([1, -1, 1, 1, -1, 1])
    bank = StackedExpertWeights([eye.repeat(E, 1, 1)], scales.bfloat16().view(E, 1, 1) * eye)
    x = torch.randint(1, 200, (T, 8), generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    spec = ExpertsSpec(rows="plain", activation="identity", combine=combine)
    weights = torch.ones(T, K, dtype=torch.bfloat16)
    want = experts_reference(x, ids, weights, bank, spec)
    assert torch.equal(experts_cpu(x, ids, weights, bank, spec), want)
    other = dataclasses.replace(spec, combine="expert" if combine == "slot" else "slot")
    assert not torch.equal(experts_reference(x, ids, weights, bank, other), want)


class Counting(StackedExpertWeights):
    """A bank that notes every expert it is asked for."""

    def w_in(self, e):
        self.asked = [*getattr(self, "asked", []), e]
        return super().w_in(e)


@pytest.mark.parametrize("T", (1, 3))
def test_idle_experts_are_never_touched(T):
    E = 1000
    bank = Counting([torch.ones(E, 4, 2)], torch.ones(E, 2, 2))
    ids = torch.tensor([[7, 901]]).expand(T, 2)
    experts_cpu(torch.ones(T, 2), ids, torch.ones(T, 2), bank, ExpertsSpec())
    assert set(bank.asked) == {7, 901}


@pytest.mark.parametrize("T", (1, 4))
@pytest.mark.parametrize("rule", ("nothing", "identity"))
def test_nan_stays_where_it_is(T, rule):
    case = make(ExpertsSpec(out_of_range=rule), T=T, E=2, K=2, dtype=torch.float32)
    case.ids[:] = torch.tensor([0, 1])
    clean = experts_cpu(*case.args)
    case.ids[0] = torch.tensor([0, -1])
    case.weights[0, 1] = torch.nan  # the weight of no expert
    assert experts_cpu(*case.args).isfinite().all()
    case.x[0] = torch.nan
    dirty = experts_cpu(*case.args)
    assert dirty[0].isnan().all()
    torch.testing.assert_close(dirty[1:], clean[1:], rtol=1e-5, atol=1e-5)  # one row fewer in expert 1's GEMM


@pytest.mark.parametrize("T", (0, 1, 4))
def test_runs_in_inference_mode_and_returns_new_memory(T):
    case = make(ExpertsSpec(rows="plain", activation="identity"), T=T, dtype=torch.float32)
    with torch.inference_mode():
        y = experts_cpu(*case.args)
    assert y.shape == case.x.shape
    assert not T or y.untyped_storage().data_ptr() != case.x.untyped_storage().data_ptr()


def test_all_slots_out_of_range():
    case = make(ExpertsSpec(out_of_range="identity"), T=3, E=2, K=2)
    case.ids[:] = torch.tensor([5, -3])
    torch.testing.assert_close(experts_cpu(*case.args), case.x * case.weights[:, :1], rtol=1e-15, atol=0)
    case.ids[:] = -1
    assert not experts_cpu(*case.args).any()


@pytest.mark.parametrize("T", (2, 60))
@pytest.mark.parametrize("weight_on", ("output", "input"))
def test_experts_of_other_widths_are_refused(T, weight_on):
    """What ``out=`` of torch finds too wide it takes anew, and the rest of the result would be what memory held."""
    spec = ExpertsSpec(rows="plain", activation="relu", weight_on=weight_on)
    bank = ListExpertWeights([[torch.ones(4, 3)] * 3], [torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 4)])
    ids = torch.tensor([[0, 1]]).repeat(T, 1)
    with pytest.raises(UsageError, match="a product of one expert is 1 wide, and that of another 3; all experts of a"):
        experts_cpu(torch.ones(T, 3), ids, torch.ones(T, 2), bank, spec)

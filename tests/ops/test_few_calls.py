"""Few calls compute what the reference does: every field, strange ids, many rows and few."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts_reference
from moeopt.ops.kernels import few_calls
from moeopt.ops.kernels.few_calls import all_experts, every_expert, in_turn
from tests.ops.cases import cases, coarsest_eps, make, naive

MANY = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def agree(case, got, args):
    want = experts_reference(*args)
    assert got.dtype == want.dtype and got.shape == want.shape
    if not want.isfinite().all():
        assert torch.equal(got.isfinite(), want.isfinite())
        return
    _, size = naive(case)
    # the same stages in the same dtypes: only sums inside a product may be ordered otherwise
    assert (got.double() - want.double()).abs().le(16 * coarsest_eps(case) * (size.max() + 1)).all()


@MANY
@given(cases(dtypes=True))
def test_in_turn_is_the_reference(case):
    if len(case.x):
        agree(case, in_turn(*case.args), case.args)


@pytest.mark.parametrize("here", (0, 10**6))
@pytest.mark.parametrize("combine", ("slot", "expert"))
def test_many_rows_sorted_by_python_or_by_torch(here, combine, monkeypatch):
    monkeypatch.setattr(few_calls, "SORTED_HERE", here)
    case = make(ExpertsSpec(combine=combine), T=70, E=5, K=3, dtype=torch.float64, strange_ids=True)
    agree(case, in_turn(*case.args), case.args)


@MANY
@given(cases(dtypes=True))
def test_every_expert_is_the_reference(case):
    E, T = case.bank.num_experts, len(case.x)
    if not T:
        return
    ids, weights = torch.arange(E).expand(T, E), torch.rand(T, E).to(case.weights.dtype)
    args = case.x, ids, weights, case.bank, case.spec
    got, want = every_expert(case.x, weights, case.bank, case.spec), experts_reference(*args)
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    if want.isfinite().all():
        far = 16 * coarsest_eps(case) * (want.double().abs().max() + 10)
        assert (got.double() - want.double()).abs().le(far).all()


def test_all_experts_are_known_without_a_look_at_each_token():
    every = torch.arange(3)
    assert all_experts(every.expand(5, 3), 3) and all_experts(every[None], 3)
    assert not all_experts(every.flip(0).expand(5, 3), 3)  # the order of the sum
    assert not all_experts(every.expand(5, 3), 4) and not all_experts(every.repeat(5, 1), 3)
    assert not all_experts(torch.tensor([[0, 1, 3]]), 3) and not all_experts(every.expand(0, 3), 3)

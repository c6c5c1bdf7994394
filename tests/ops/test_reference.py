"""The definition against a second definition, over every axis of the spec."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moeopt.errors import UsageError
from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec
from moeopt.ops import experts_reference
from tests.ops.cases import cases, make, naive

MANY = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@MANY
@given(cases())
def test_equals_the_naive_loop(case):
    want, size = naive(case)
    got = experts_reference(*case.args)
    # float64 rounds at 1e-16; sums of up to 6 x 5 products and a few elementwise steps stay below 1e-12 of their terms
    assert (got - want).abs().le(1e-12 * (size + 1)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    alpha = {"swish": 1.702, "softcap": 2.0, "leaky_relu": 0.1, "elu": 1.5}.get(activation)
    case = make(ExpertsSpec(activation=activation, alpha=alpha))
    torch.testing.assert_close(experts_reference(*case.args), naive(case)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "up|gate"},
        {"rows": "interleaved"},
        {"rows": "interleaved_up"},
        {"activation": "gelu"},
        {"gate_max": 0.1},
        {"up_min": -0.1},
        {"act_max": 0.1},
        {"up_offset": 1.0},
        {"weight_on": "input"},
        {"out_norm_eps": 1e-6},
    ],
    ids=str,
)
def test_a_wrong_spec_is_seen(change):
    case = make(ExpertsSpec())
    wrong = dataclasses.replace(case, spec=dataclasses.replace(case.spec, **change))
    distance = (experts_reference(*wrong.args) - naive(case)[0]).abs().max()
    assert distance > 1e-3


def test_dtype_rules_step_by_step():
    spec = ExpertsSpec(compute_dtype="bfloat16", act_dtype="float32", accum_dtype="float32", out_dtype="float16")
    case = make(spec, T=3, E=2, K=2, dtype=torch.float32)
    y = experts_reference(*case.args)
    want = torch.zeros(3, 6)
    for t in range(3):
        for k in range(2):
            e = int(case.ids[t, k])
            r = case.x[t : t + 1].to(torch.bfloat16)
            w_in, b_in = case.bank.w_in(e)[0].bfloat16(), case.bank.b_in(e)[0].bfloat16()
            g, u = torch.nn.functional.linear(r, w_in, b_in).float().chunk(2, -1)
            a = (torch.nn.functional.silu(g) * u).to(torch.bfloat16)
            o = torch.nn.functional.linear(a, case.bank.w_out(e).bfloat16(), case.bank.b_out(e).bfloat16())
            want[t] += (o * case.weights[t, k, None])[0]  # bfloat16 row times float32 weight: float32
    assert y.dtype == torch.float16
    # one row instead of several may sum a GEMM in another order: one float16 and one bfloat16 rounding apart
    torch.testing.assert_close(y, want.half(), rtol=2**-8, atol=2**-8)


def test_order_of_the_sum_is_the_spec_s():
    """256 + 1 loses the 1 in bfloat16, so the order shows: slots are 1, 256, -256 and experts 2, 0, 1."""
    eye = torch.eye(1, dtype=torch.bfloat16)
    scales = torch.tensor([256.0, -256.0, 1.0], dtype=torch.bfloat16).view(3, 1, 1)
    ids, weights = torch.tensor([[2, 0, 1]]), torch.ones(1, 3, dtype=torch.bfloat16)
    from moeopt.ops import StackedExpertWeights

    bank = StackedExpertWeights([eye.repeat(3, 1, 1)], scales * eye)
    results = {
        combine: experts_reference(
            eye, ids, weights, bank, ExpertsSpec(rows="plain", activation="identity", combine=combine)
        ).item()
        for combine in ("slot", "expert")
    }
    assert results == {"slot": 0.0, "expert": 1.0}


def test_refuses_what_has_no_meaning():
    case = make(ExpertsSpec(), wide=3)
    x, ids, weights, bank, spec = case.args
    with pytest.raises(UsageError, match=r"must be \(T, H\), \(T, K\) and \(T, K\): flatten batch"):
        experts_reference(x[None], ids, weights, bank, spec)
    with pytest.raises(UsageError, match="ids have dtype torch.float64; pass the integer ids"):
        experts_reference(x, weights, weights, bank, spec)
    with pytest.raises(UsageError, match="such a block needs out_of_range='nothing'"):
        experts_reference(x, ids, weights, bank, dataclasses.replace(spec, out_of_range="identity"))

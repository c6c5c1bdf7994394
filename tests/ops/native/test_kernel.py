"""The native kernel is the reference, only faster: every field of the spec, any size, dtype and strides."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts_reference
from moeopt.ops.native.selfcheck import specs as all_fields
from tests.ops.cases import cases, coarsest_eps, naive, specs
from tests.ops.native.blocks import Sizes, random_block

MANY = settings(
    max_examples=80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*DTYPES, torch.float64)


def far(got, want, eps):
    """How far apart, in the budget: a stage's rounding a few times over, of the largest value of the result."""
    assert got.dtype == want.dtype and got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / (16 * eps * (want.double().abs().max() + 1))).item()


@MANY
@given(case=cases(dtypes=True))
def test_equals_the_reference_in_mixed_dtypes(kernel, case):
    if case.x.shape[0] == 0 or not kernel_takes(case.ids, case.bank):
        return
    got, want = kernel(*case.args), experts_reference(*case.args)
    assert got.dtype == want.dtype and got.shape == want.shape
    if not want.isfinite().all():
        assert torch.equal(got.isfinite(), want.isfinite())
        return
    _, size = naive(case)
    # as for torch's kernels: one rounding of each of at most 8 stages, which the activation's slope may double
    assert (got.double() - want.double()).abs().le(16 * coarsest_eps(case) * (size + 1)).all()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_experts_without_neurons_give_their_biases(kernel, dtype):
    for seed, (rows, layout) in enumerate((("gate|up", "oi"), ("plain", "io"), ("separate", "oi"))):
        spec = ExpertsSpec(rows=rows, w_out_layout=layout)
        args = random_block(spec, Sizes(I=0), dtype, biases=bool(seed), seed=seed, stacked=False)
        assert far(kernel(*args), experts_reference(*args), torch.finfo(dtype).eps) <= 1


def kernel_takes(ids, bank):
    """A list of experts of which none is named has no width that the kernel could read."""
    return bank.stacked() is not None or bool(((ids >= 0) & (ids < bank.num_experts)).any())


@MANY
@given(
    spec=specs(dtypes=True),
    sizes=st.builds(
        Sizes, T=st.integers(1, 40), K=st.integers(1, 3), E=st.integers(1, 5), H=st.integers(1, 140),
        I=st.integers(1, 140), D=st.integers(1, 140),
    ),
    dtype=st.sampled_from(DTYPES), weight_dtype=st.sampled_from(DTYPES), routing_dtype=st.sampled_from(DTYPES),
    stacked=st.booleans(), biases=st.booleans(), seed=st.integers(0, 999), strange_ids=st.booleans(),
)  # fmt: skip
def test_any_size_dtype_and_strides(kernel, spec, sizes, dtype, weight_dtype, routing_dtype, **rest):
    args = random_block(spec, sizes, dtype, weight_dtype, routing_dtype, **rest)
    if not kernel_takes(args[1], args[3]):
        return
    got, want = kernel(*args), experts_reference(*args)
    names = [n for n in (spec.compute_dtype, spec.act_dtype, spec.accum_dtype, spec.out_dtype) if n]
    eps = max(torch.finfo(d).eps for d in [dtype, routing_dtype, *(getattr(torch, n) for n in names)])
    assert far(got, want, eps) <= 1


@MANY
@given(
    spec=specs(),
    sizes=st.builds(
        Sizes, T=st.integers(1, 80), K=st.integers(1, 3), E=st.integers(1, 5), H=st.integers(1, 140),
        I=st.integers(1, 140), D=st.integers(1, 140),
    ),
    routing_dtype=st.sampled_from(ALL_DTYPES), stacked=st.booleans(), biases=st.booleans(),
    seed=st.integers(0, 999), strange_ids=st.booleans(),
)  # fmt: skip
def test_any_size_and_strides_in_float64(kernel, spec, sizes, routing_dtype, **rest):
    args = random_block(spec, sizes, torch.float64, torch.float64, routing_dtype, **rest)
    if not kernel_takes(args[1], args[3]):
        return
    # as for torch's kernels: one rounding of each of at most 8 stages, of sums of up to 140 numbers
    assert far(kernel(*args), experts_reference(*args), torch.finfo(torch.float64).eps) <= 1


@pytest.mark.parametrize("activation", [s.activation for s in all_fields()])
def test_an_activation_in_float64_is_as_exact_as_torch_s(best, activation):
    """From far below zero, through what underflows, to what overflows; not a number stays none."""
    spec = ExpertsSpec(rows="plain", activation=activation, alpha=1.5, out_of_range="nothing")
    far_out = torch.tensor([-1e300, -800.0, -745.5, -710.0, -40.0, -0.0, 5e-324, 1e-9, 709.9, 711.0, 1e300])
    x = torch.cat([far_out.double(), torch.linspace(-30, 30, 4001).double(), torch.tensor([torch.nan])])[:, None]
    bank = StackedExpertWeights([torch.ones(1, 1, 1).double()], torch.ones(1, 1, 1).double())
    args = x, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1).double(), bank, spec
    # GELU's 1 + erf(x) is a rounded difference of two numbers near 1 where x is below zero, and is multiplied by x
    least = 1e-15 if activation.startswith("gelu") else 1e-300
    torch.testing.assert_close(best(*args), experts_reference(*args), rtol=2e-14, atol=least, equal_nan=True)


EXACT = ("relu", "identity", "leaky_relu", "relu2")


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", (None, "float32", "bfloat16", "float16"))
def test_rounds_where_the_model_rounds(kernel, activation, dtype, act):
    """Sums of small whole numbers are exact in any order, so every rounding must be the reference's, bit for bit."""
    for seed, accum in enumerate((None, "float32", "bfloat16", "float16")):
        spec = ExpertsSpec(
            activation=activation, alpha=0.5, act_dtype=act, accum_dtype=accum, up_offset=1.0, gate_max=100.0,
            up_min=-7.0, combine=("slot", "expert")[seed % 2], weight_on=("output", "input")[seed // 2],
            out_of_range=("identity", "nothing")[seed % 2], rows=("gate|up", "interleaved", "plain", "up|gate")[seed],
            w_in_layout=("oi", "io")[seed % 2], w_out_layout=("oi", "io")[seed // 2],
        )  # fmt: skip
        # squares grow: few of them, so that their sums stay below 2^24
        sizes = Sizes(T=13, K=3, H=7, I=9, D=7) if activation == "relu2" else Sizes(T=13, K=3, H=37, I=45, D=37)
        args = random_block(spec, sizes, dtype, seed=seed, strange_ids=True, whole_numbers=True)
        torch.testing.assert_close(kernel(*args), experts_reference(*args), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ("oi", "io"))
@pytest.mark.parametrize("T", (1, 2, 5, 12, 64, 65, 300))
def test_row_counts_around_the_tiles(kernel, T, layout, dtype):
    spec = ExpertsSpec(w_in_layout=layout, w_out_layout=layout)
    args = random_block(spec, Sizes(T=T, K=1, E=2, H=96, I=80, D=64), dtype)
    assert far(kernel(*args), experts_reference(*args), torch.finfo(dtype).eps) <= 1


@pytest.mark.sample(4)
@pytest.mark.parametrize("layout", ("oi", "io"))
def test_long_sums_are_chunked(kernel, layout):
    spec = ExpertsSpec(w_in_layout=layout, w_out_layout=layout, rows="plain", activation="relu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        args = random_block(spec, Sizes(T=3, E=1, K=1, H=2500, I=4200, D=9), dtype, biases=False)
        assert far(kernel(*args), experts_reference(*args), torch.finfo(dtype).eps) <= 1


@pytest.mark.parametrize("spec", all_fields(), ids=str)
def test_every_field_runs_native(best, spec):
    for dtype in DTYPES:
        args = random_block(spec, Sizes(), dtype, strange_ids=True)
        names = [n for n in (spec.compute_dtype, spec.act_dtype, spec.accum_dtype, spec.out_dtype) if n]
        eps = max(torch.finfo(d).eps for d in [dtype, *(getattr(torch, n) for n in names)])
        assert far(best(*args), experts_reference(*args), eps) <= 1


@pytest.mark.parametrize("combine", ("slot", "expert"))
def test_the_sum_s_order_is_exact(kernel, combine):
    E, K, T = 6, 5, 9
    generator = torch.Generator().manual_seed(T)
    eye = torch.eye(8, dtype=torch.bfloat16)
    scales = (2.0 ** torch.arange(-4, 8, 2)) * torch.tensor([1, -1, 1, 1, -1, 1])
    bank = StackedExpertWeights([eye.repeat(E, 1, 1)], scales.bfloat16().view(E, 1, 1) * eye)
    x = torch.randint(1, 200, (T, 8), generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    spec = ExpertsSpec(rows="plain", activation="identity", combine=combine)
    args = x, ids, torch.ones(T, K, dtype=torch.bfloat16), bank
    want = experts_reference(*args, spec)
    assert torch.equal(kernel(*args, spec), want)
    other = dataclasses.replace(spec, combine="expert" if combine == "slot" else "slot")
    assert not torch.equal(experts_reference(*args, other), want)


@pytest.mark.parametrize("ids", (torch.int32, torch.int64, torch.int16, torch.uint8), ids=str)
def test_ids_of_any_integer_dtype_and_expanded_inputs(kernel, ids):
    x, given_ids, weights, bank, spec = random_block(ExpertsSpec(), Sizes(T=4, K=2))
    x, weights = x[:1].expand(4, -1), weights[:1, :1].expand(4, 2)
    for table in (given_ids.to(ids), given_ids[:1].to(ids).expand(4, 2), given_ids.t().contiguous().t().to(ids)):
        args = x, table, weights, bank, spec
        assert far(kernel(*args), experts_reference(x, table.long(), weights, bank, spec), 1.2e-7) <= 1

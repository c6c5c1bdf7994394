"""The Triton kernels, run by Triton's interpreter, are the reference.

What the interpreter can't show: how tensor cores round (products are NumPy's, in float32), and bfloat16's rounding,
since the interpreter truncates where a GPU rounds to nearest (twice the error at most). Its product of bfloat16
operands is wrong, so the kernels widen those operands there.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec
from moeopt.ops import ListExpertWeights, experts_reference
from moeopt.ops.activations import activate
from moeopt.ops.triton import launch
from moeopt.ops.triton.launch import experts_triton, launches
from moeopt.ops.triton.tiles import Tiles
from moeopt.ops.unfit import Unfit
from tests.ops.cases import cases, coarsest_eps, make, naive

pytestmark = pytest.mark.usefixtures("interpreted")

SMALL = Tiles(16, 16, 16, 4, 1)
FEW, MANY = 1 << 30, 0
RANDOM = settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def agree(case, few):
    got, want = experts_triton(*case.args, few=few, tiles=SMALL), experts_reference(*case.args)
    assert got.dtype == want.dtype and got.shape == want.shape
    if not want.isfinite().all():
        assert torch.equal(got.isfinite(), want.isfinite())
        return
    _, size = naive(case)
    # as for the CPU kernels: at most 8 stages, each one rounding of its dtype, doubled by the activation's slope
    assert (got.double() - want.double()).abs().le(16 * coarsest_eps(case) * (size + 1)).all()


@RANDOM
@given(cases(dtypes=True))
def test_every_field_of_the_spec_with_few_pairs(case):
    agree(case, FEW)


@RANDOM
@given(cases(dtypes=True))
def test_every_field_of_the_spec_with_many_pairs(case):
    agree(case, MANY)


@pytest.mark.sample(2)
@pytest.mark.parametrize("T", (1, 15, 16, 17, 70))
@pytest.mark.parametrize("few", (FEW, MANY))
def test_rows_around_a_tile(T, few):
    agree(make(ExpertsSpec(rows="separate"), T=T, E=3, K=2, dtype=torch.float32, stacked=False, seed=T), few)


@pytest.mark.parametrize("few", (FEW, MANY))
def test_widths_around_a_tile(few):
    g = torch.Generator().manual_seed(0)
    for H, I in ((16, 16), (17, 33), (31, 15), (48, 130)):
        w_in = [[torch.randn(I, H, generator=g) / H**0.5 for _ in range(2)] for _ in range(2)]
        bank = ListExpertWeights(w_in, [torch.randn(H, I, generator=g) / I**0.5 for _ in range(2)])
        x, w = torch.randn(5, H, generator=g), torch.rand(5, 2, generator=g)
        ids = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1], [5, -1]])
        spec = ExpertsSpec(rows="separate")
        got = experts_triton(x, ids, w, bank, spec, few=few, tiles=SMALL)
        want = experts_reference(x, ids, w, bank, spec)
        assert (got - want).abs().max() <= 16 * 1.2e-7 * want.abs().max()


@pytest.mark.parametrize("few", (FEW, MANY))
def test_512_experts(few):
    case = make(ExpertsSpec(), T=20, E=512, K=1, dtype=torch.float32)
    case.ids = torch.arange(20)[:, None] * 25 % 512
    agree(case, few)


@pytest.mark.sample(3)
@pytest.mark.parametrize("few", (FEW, MANY))
@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int32))
def test_ids_of_any_dtype_where_each_of_its_values_is_an_expert(few, dtype):
    case = make(ExpertsSpec(), T=20, E=257, K=1, dtype=torch.float32)
    case.ids = torch.arange(-10, 10)[:, None].to(dtype)
    agree(case, few)


@pytest.mark.sample(2)
@pytest.mark.parametrize("e", (0, 39, -3))
@pytest.mark.parametrize("few", (FEW, MANY))
def test_all_tokens_on_one_expert_or_on_none(few, e):
    case = make(ExpertsSpec(), T=20, E=40, K=1, dtype=torch.float32)
    case.ids = torch.full((20, 1), e)
    agree(case, few)


@pytest.mark.parametrize("few", (FEW, MANY))
@pytest.mark.parametrize("combine", ("slot", "expert"))
def test_strides_of_rows_ids_and_weights(few, combine):
    case = make(ExpertsSpec(combine=combine), T=6, E=4, K=3, dtype=torch.float32, strange_ids=True)
    want = experts_reference(*case.args)
    x = case.x.t().contiguous().t()
    ids = torch.stack([case.ids, case.ids], -1)[..., 0].to(torch.int32)
    weights = case.weights.t().contiguous().t()
    got = experts_triton(x, ids, weights, case.bank, case.spec, few=few, tiles=SMALL)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32 sums of 6 terms of size 1
    row = case.x[:1].expand(6, -1)
    want = experts_reference(row, case.ids, case.weights, case.bank, case.spec)
    got = experts_triton(row, case.ids, case.weights, case.bank, case.spec, few=few, tiles=SMALL)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few", (FEW, MANY))
def test_a_token_s_nan_stays_its_own(few):
    case = make(ExpertsSpec(), T=9, E=2, K=1, dtype=torch.float32)
    clean = experts_triton(*case.args, few=few, tiles=SMALL)
    case.x[4] = torch.nan
    dirty = experts_triton(*case.args, few=few, tiles=SMALL)
    others = torch.arange(9) != 4
    assert torch.equal(dirty[others], clean[others]) and dirty[4].isnan().all()


@pytest.fixture
def row_by_row(monkeypatch):
    """NumPy's product gives a row other bits at another place in a tile, on CPUs whose BLAS has such kernels."""
    from triton.runtime import interpreter

    theirs = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *how):
        def row(handle, i):
            return interpreter.TensorHandle(handle.data[i : i + 1], handle.dtype)

        rows = [theirs(self, row(a, i), b, row(d, i), *how).data for i in range(len(a.data))]
        return interpreter.TensorHandle(np.concatenate(rows), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("few", (FEW, MANY))
@pytest.mark.usefixtures("row_by_row")
def test_bits_do_not_depend_on_other_tokens_of_the_batch(few):
    case = make(ExpertsSpec(), T=40, E=3, K=2, dtype=torch.float32)
    whole = experts_triton(*case.args, few=few, tiles=SMALL)
    for t in (0, 17, 39):
        one = slice(t, t + 1)
        alone = experts_triton(
            case.x[one], case.ids[one], case.weights[one], case.bank, case.spec, few=few, tiles=SMALL
        )
        assert torch.equal(alone, whole[one])


def test_no_tokens():
    case = make(ExpertsSpec(), T=0, dtype=torch.float32)
    assert experts_triton(*case.args).shape == experts_reference(*case.args).shape


def test_a_weight_that_moved_is_found_where_it_is_now():
    case = make(ExpertsSpec(rows="separate"), dtype=torch.float32, stacked=False)
    experts_triton(*case.args)
    case.bank.w_out_l[1].data = case.bank.w_out_l[1].clone() * 3
    agree(case, MANY)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        self.log.append(self.kernel)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched since it was last emptied."""
    from moeopt.ops.triton import kernels

    log = []
    for name in ("gemv_in", "gemv_out", "gemv_pair", "sort_pairs", "tile_in", "tile_out", "combine_normed", "combine"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), log))
    return log


@pytest.mark.parametrize("few", (FEW, MANY))
def test_kernels_are_launched_while_the_device_of_x_is_the_current_one(few, launched, monkeypatch):
    current, at_exit = [], []

    @contextlib.contextmanager
    def recorded(device):
        current.append(device)
        assert not launched
        yield
        at_exit.append(len(launched))

    monkeypatch.setattr(launch, "_current", recorded)
    agree(make(ExpertsSpec(), T=3, E=2, K=1, dtype=torch.float32), few)
    assert current == [torch.device("cpu")] and at_exit == [len(launched)] and launched


def test_the_current_device_is_that_of_the_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"with {device}")
    assert launch._current(torch.device("cuda", 1)) == "with cuda:1"


def test_ids_on_another_device_are_declined():
    case = make(ExpertsSpec(), T=3, E=2, K=1, dtype=torch.float32)
    with pytest.raises(Unfit, match="x is on cpu, ids on meta and routing weights on cpu"):
        experts_triton(case.x, case.ids.to("meta"), case.weights, case.bank, case.spec)


@pytest.mark.parametrize("norm", (None, 1e-6))
def test_as_many_launches_as_the_report_says(norm, launched):
    case = make(ExpertsSpec(out_norm_eps=norm), T=3, E=2, K=1, dtype=torch.float32, biases=False)
    counts = []
    for few in (FEW, MANY):
        launched.clear()
        agree(case, few)
        counts.append(len(launched))
    assert tuple(counts) == launches(case.spec)


class MadeAtEachRead(ListExpertWeights):
    """Weights that nobody holds but who reads them, as where neurons are picked from a wider matrix."""

    def w_in(self, e):
        return tuple(w.clone() for w in super().w_in(e))

    def w_out(self, e):
        return super().w_out(e).clone()


@pytest.mark.parametrize("few", (FEW, MANY))
def test_weights_that_are_made_at_each_read_live_until_the_kernels_have_run(few):
    case = make(ExpertsSpec(rows="separate"), T=9, E=4, K=2, dtype=torch.float32, stacked=False)
    case.bank = MadeAtEachRead(case.bank.w_in_l, case.bank.w_out_l, case.bank.b_in_l, case.bank.b_out_l)
    agree(case, few)


def _changed(bank, change):
    lists = [list(ws) for ws in bank.w_in_l]
    lists[0][1] = change(lists[0][1])
    return ListExpertWeights(lists, bank.w_out_l)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.t().contiguous().t(), "with strides (1, 5), and that of another expert (5, 6) torch.float32"),
        (lambda w: w.half(), "the input weight of expert 1 is (5, 6) torch.float16"),
    ],
)
def test_experts_that_differ_are_declined(change, reason):
    case = make(ExpertsSpec(rows="separate"), dtype=torch.float32, stacked=False, biases=False)
    with pytest.raises(Unfit) as err:
        experts_triton(case.x, case.ids, case.weights, _changed(case.bank, change), case.spec)
    assert reason in str(err.value)


@pytest.mark.parametrize("field", ("compute_dtype", "act_dtype", "accum_dtype", "out_dtype"))
def test_float64_is_declined_by_name(field):
    case = make(dataclasses.replace(ExpertsSpec(), **{field: "float64"}), dtype=torch.float32)
    with pytest.raises(Unfit, match="dtype is float64; the kernels have 16 and 32 bits"):
        experts_triton(*case.args)


FORMULAS = {  # how many of float32's eps the relative error may be where |x| <= 1
    "silu": 4, "gelu": 4, "gelu_tanh": 8, "sigmoid": 4, "tanh": 4, "mish": 8, "softplus": 4, "elu": 8,
}  # fmt: skip
EPS, SMALLEST = 1.2e-7, 1.2e-38


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FORMULAS)
def test_activations_over_the_whole_range(name):
    """One expert, W the identity: what comes out is the activation itself."""
    alpha = 1.0 if name == "elu" else None
    values = torch.cat([s * torch.logspace(-30, 2, 120) for s in (1, -1)] + [torch.zeros(1)])
    spec = ExpertsSpec(rows="plain", activation=name, alpha=alpha)
    x = torch.zeros(len(values), 16)
    x[:, 0] = values
    bank = ListExpertWeights([[torch.eye(16)]], [torch.eye(16)])
    ids, weights = torch.zeros(len(values), 1, dtype=torch.int64), torch.ones(len(values), 1)
    got = experts_triton(x, ids, weights, bank, spec, few=MANY, tiles=Tiles(64, 16, 16, 4, 1))[:, 0].double()
    want, size = activate(values.double(), name, alpha), values.double().abs()
    # an argument of exp is off by |x| roundings; torch's float32 gelu too subtracts numbers near 1 in its tail
    tail = size if name.startswith("gelu") else 0
    assert ((got - want).abs() <= FORMULAS[name] * EPS * (want.abs() * (1 + size) + tail) + SMALLEST).all()


def test_the_table_above_has_every_activation_that_is_no_plain_arithmetic():
    plain = {"relu", "relu2", "identity", "leaky_relu", "swish", "softcap"}  # by products, sigmoid and tanh
    assert set(FORMULAS) | plain == set(ACTIVATIONS)

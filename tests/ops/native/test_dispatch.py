"""Which kernel runs a call: the native one where it is taken and faster, torch's matmuls else, and nobody notices."""

import pytest
import torch
from torch.autograd import forward_ad

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts, experts_reference, measured
from moeopt.ops.kernels import gemm
from moeopt.ops.native import dispatch, library
from moeopt.ops.native.call import encode_spec
from moeopt.ops.unfit import Unfit
from tests.ops.cases import make
from tests.ops.native.blocks import Sizes, random_block


@pytest.fixture
def taken(monkeypatch, whole_library):
    """The names of the kernels that ran."""
    ran = []

    def noted(name, honest):
        def kernel(*args):
            y = honest(*args)
            ran.append(name)
            return y

        monkeypatch.setattr(dispatch, name, kernel)

    for name in ("call", "experts_cpu"):
        noted(name, getattr(dispatch, name))
    assert dispatch.library() is not None
    return ran


def close(got, case):
    torch.testing.assert_close(got, experts_reference(*case.args), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("stacked", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_native_where_it_is_faster(taken, dtype, stacked, monkeypatch):
    case = make(ExpertsSpec(), dtype=dtype, stacked=stacked)
    close(experts(*case.args), case)
    assert taken == ["call"]
    monkeypatch.setattr(dispatch, "fastest", lambda question, ways, default, advantage: "torch")
    dispatch._native.cache_clear()
    try:
        close(experts(*case.args), case)
    finally:
        dispatch._native.cache_clear()
    assert taken == ["call", "experts_cpu"]


def test_both_ways_of_the_measurement_compute_the_same(taken, monkeypatch):
    asked = []

    def fastest(question, ways, default, advantage):
        asked.append(question)
        found = {name: way() for name, way in ways().items()}
        torch.testing.assert_close(found["native"], found["torch"], rtol=2e-2, atol=2e-2)
        return default

    monkeypatch.setattr(dispatch, "fastest", fastest)
    dispatch._native.cache_clear()
    try:
        for spec in (ExpertsSpec(), ExpertsSpec(rows="separate", w_in_layout="io"), ExpertsSpec(rows="plain")):
            for T in (1, 9, 300):
                experts(*make(spec, T=T, dtype=torch.bfloat16).args)
    finally:
        dispatch._native.cache_clear()
    assert len(asked) == 9 and "experts of 128 rows, bfloat16, W bfloat16 oi oi, gated, 64x64, " in " ".join(asked)


def test_many_rows_of_small_weights_are_asked_about_with_their_sizes(taken, monkeypatch):
    """Where a product is short, the ends of its sums decide: one answer for all small sizes made some blocks slower."""
    asked, advantages = [], []

    def fastest(question, ways, default, advantage):
        asked.append(question.split("gated, ")[1].split(",")[0])
        advantages.append(advantage)
        for way in ways().values():
            way()
        return default

    monkeypatch.setattr(dispatch, "fastest", fastest)
    dispatch._native.cache_clear()
    try:
        for T, sizes in ((300, (384, 200)), (2, (384, 200)), (2, (96, 100)), (300, (90, 2000)), (300, (600, 600))):
            block = random_block(ExpertsSpec(), Sizes(T, 2, 4, *sizes, sizes[0]), torch.bfloat16)
            with torch.no_grad():
                experts(*block)
    finally:
        dispatch._native.cache_clear()
    assert asked == ["384x192", "256x256", "96x1024", "large"]
    assert advantages == [dispatch.SMALL_ADVANTAGE] * 3 + [dispatch.LARGE_ADVANTAGE]


def every(T, dtype, stacked=True, E=3):
    """A block whose tokens all go to every expert."""
    x, _, _, bank, spec = make(ExpertsSpec(), T=T, E=E, K=1, dtype=dtype, stacked=stacked).args
    return x, torch.arange(E).expand(T, E), torch.rand(T, E).to(dtype), bank, spec


@pytest.fixture
def asked(monkeypatch):
    """The questions about calls of every expert on every row, each with the names of its ways, which agree."""
    questions = []

    def fastest(question, ways, default, advantage):
        found = {name: way() for name, way in ways().items()}
        for y in found.values():
            torch.testing.assert_close(y, found["torch"], rtol=2e-2, atol=2e-2)
        questions.append((question, tuple(sorted(found)), default))
        return "torch"

    monkeypatch.setattr(dispatch, "fastest", fastest)
    dispatch._of_every.cache_clear()
    yield questions
    dispatch._of_every.cache_clear()


@pytest.mark.parametrize(
    ("T", "dtype", "stacked", "ways"),
    [
        (1, torch.float32, True, ("native", "torch")),
        (9, torch.float32, False, ("native", "neurons", "torch")),
        (1, torch.bfloat16, True, ("native", "torch")),
        (9, torch.bfloat16, False, ("native", "torch")),
        (9, torch.float64, True, ("native", "torch")),
    ],
    ids=str,
)
def test_where_every_expert_takes_every_row_all_ways_are_asked_about_at_once(taken, asked, T, dtype, stacked, ways):
    args = every(T, dtype, stacked)
    for _ in range(2):
        torch.testing.assert_close(experts(*args), experts_reference(*args), rtol=2e-2, atol=2e-2)
    ((question, found, default),) = asked
    assert found == ways and default == "native" and taken[-2:] == ["experts_cpu", "experts_cpu"]
    assert f"each of 4 experts on {1 if T == 1 else 16} rows of 8, " in question


def test_without_the_kernel_or_where_it_does_not_take_the_call_the_others_are_compared(taken, asked, monkeypatch):
    x, ids, weights, bank, _ = every(9, torch.float32)
    spec = ExpertsSpec(accum_dtype="float64")  # beside another dtype
    torch.testing.assert_close(experts(x, ids, weights, bank, spec), experts_reference(x, ids, weights, bank, spec))
    monkeypatch.setattr(dispatch, "library", lambda: None)
    args = every(9, torch.float32)
    torch.testing.assert_close(experts(*args), experts_reference(*args))
    ((question, ways, default),) = asked  # none of the first: torch's matmuls were all that was left
    assert (ways, default) == (("neurons", "torch"), "torch") and "no kernel" in question
    assert "call" not in taken


@pytest.mark.parametrize("T", (1, 3, 40))
def test_ids_that_name_every_expert_are_known_however_they_are_stored(taken, monkeypatch, T):
    x, ids, weights, bank, spec = every(T, torch.float32)
    ways = []
    monkeypatch.setattr(dispatch, "_of_every", lambda *args: ways.append(args) or "torch")
    other = ids.flip(1)  # each row names all, in another order
    for named in (ids, ids.contiguous(), ids.to(torch.int32)):
        args = x, named, weights, bank, spec
        torch.testing.assert_close(experts(*args), experts_reference(*args))
    experts(x, other, weights, bank, spec)
    assert len(ways) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"spec": ExpertsSpec(accum_dtype="float64")},
            "float64 stands beside another dtype; the kernel has it by itself",
        ),
        ({"spec": ExpertsSpec(compute_dtype="float64")}, "float64 stands beside another dtype"),
        ({"spec": ExpertsSpec(out_dtype="float32"), "dtype": torch.float64}, "float64 stands beside another dtype"),
        ({"K": 0}, ""),
    ],
)
def test_what_the_kernel_does_not_take_it_names(taken, change, reason):
    case = make(**{"spec": ExpertsSpec(), "dtype": torch.float32, **change})
    close(experts(*case.args), case)
    assert taken == ["experts_cpu"]
    if reason:
        with pytest.raises(Unfit, match=reason):
            dispatch.call(dispatch.library().run, *case.args, dispatch.library().bit)


@pytest.mark.parametrize("stacked", (True, False))
@pytest.mark.parametrize("spec", (ExpertsSpec(out_dtype="float32"), ExpertsSpec(compute_dtype="float64")), ids=str)
def test_what_the_kernel_does_not_take_is_asked_once(taken, monkeypatch, spec, stacked):
    """Nothing is measured at later calls: that took ten times as long as the experts."""
    asked, honest = [], dispatch._ways
    monkeypatch.setattr(dispatch, "_ways", lambda *args: asked.append(args) or honest(*args))
    monkeypatch.setattr(measured, "measuring", lambda: True)
    dtype = torch.float32 if spec.compute_dtype else torch.float64
    case = make(spec, T=5, dtype=dtype, stacked=stacked)
    dispatch._native.cache_clear()
    for _ in range(3):
        close(experts(*case.args), case)
    assert len(asked) <= 1 and taken == ["experts_cpu"] * 3


def test_shapes_that_do_not_fit_fail_as_they_do_without_it(taken):
    case = make(ExpertsSpec(), dtype=torch.float32)
    for bank in (
        StackedExpertWeights([torch.ones(4, 10, 7)], torch.ones(4, 6, 5)),  # W_in takes another width
        StackedExpertWeights([torch.ones(4, 10, 6)], torch.ones(4, 6, 4)),  # W_out another intermediate
        StackedExpertWeights([torch.ones(4, 10, 6)], torch.ones(4, 6, 5), [torch.ones(4, 9)]),  # a bias
        StackedExpertWeights([torch.ones(4, 10, 6)], torch.ones(4, 6, 5), None, torch.ones(4, 7)),
    ):
        with pytest.raises(RuntimeError, match="size|shape|expanded"):
            experts(case.x, case.ids, case.weights, bank, case.spec)
    assert set(taken) == set()


class Logged(torch.Tensor):
    """A subclass may mean something else by its numbers."""


def test_subclasses_and_transforms_run_as_before(taken):
    case = make(ExpertsSpec(), dtype=torch.float32)
    bank = StackedExpertWeights([w.as_subclass(Logged) for w in case.bank.w_in_s], case.bank.w_out_s)
    experts(case.x, case.ids, case.weights, bank, case.spec)
    assert taken == ["experts_cpu"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.x, torch.ones_like(case.x))
        y = experts(dual, case.ids, case.weights, case.bank, case.spec)
        forward = forward_ad.unpack_dual(y).tangent

    def result(x):
        return experts(x, case.ids, case.weights, case.bank, case.spec)

    step = 1e-3
    slope = (result(case.x + step) - result(case.x - step)) / (2 * step)
    ran = len(taken)
    functional = torch.func.jvp(result, (case.x,), (torch.ones_like(case.x),))[1]
    assert len(taken) == ran, "neither kernel has tangents"
    torch.testing.assert_close(forward, functional)
    torch.testing.assert_close(forward, slope, rtol=0.02, atol=0.02)  # float32 differences


def test_experts_of_unequal_size_and_absent_biases(taken):
    g = torch.Generator().manual_seed(0)
    sizes = (4, 30, 17)
    w_in = [torch.randn(2 * n, 12, generator=g) for n in sizes]
    w_out = [torch.randn(12, n, generator=g) for n in sizes]
    bank = ListExpertWeights([w_in], w_out, [[None, torch.randn(60, generator=g), None]], [torch.ones(12), None, None])
    x, ids = torch.randn(9, 12, generator=g), torch.arange(3).expand(9, 3)
    args = x, ids, torch.rand(9, 3, generator=g), bank, ExpertsSpec()
    torch.testing.assert_close(experts(*args), experts_reference(*args), rtol=1e-5, atol=1e-4)
    assert taken == ["call"]


def test_weights_that_change_in_place_are_seen(taken):
    case = make(ExpertsSpec(), dtype=torch.float32)
    before = experts(*case.args)
    case.bank.w_out_s.mul_(2)
    case.bank.b_out_s.mul_(2)
    assert torch.equal(experts(*case.args), 2 * before) and set(taken) == {"call"}


def test_another_default_device_changes_nothing(taken, monkeypatch):
    case = make(ExpertsSpec(gate_max=1.0), dtype=torch.bfloat16)
    want = experts(*case.args)
    questions = []

    def fastest(question, ways, default, advantage):
        questions.append(question)
        return measured.fastest(question, ways, default, advantage)

    monkeypatch.setattr(dispatch, "fastest", fastest)
    monkeypatch.setattr(measured, "measuring", lambda: True)
    monkeypatch.setattr(measured, "cache_directory", lambda: None)
    for cached in (dispatch._native, encode_spec):
        cached.cache_clear()
    measured._answers.clear()
    found, native = library._found, library.load
    try:
        with torch.device("meta"):
            assert torch.allclose(experts(*case.args).float(), want.float(), rtol=0.02, atol=0.02)
            assert native().isa == found.isa
    finally:
        measured._answers.clear()
        for cached in (dispatch._native, gemm._choose, gemm._filled):
            cached.cache_clear()
    assert questions

"""What every form of standard operators must do, run by ONNX Runtime: the reference's numbers, and no leaks."""

import random

import pytest
import torch

from moeopt.backends.tensorrt.graph_check import check_graph
from moeopt.backends.tensorrt.lowerings import FORMS, FUNCTION_FORMS, PORTABLE, by_name
from moeopt.backends.tensorrt.target import parse_target
from moeopt.errors import UsageError
from moeopt.ir.specs import ACTIVATIONS
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, model_of, run, session_of, tokens

BUDGET = 32  # eps of a row's largest entry (at least 1): 12 + 6 + 4 terms, |activation| below 4; 6.3 measured
NAMES = [form.name for form in PORTABLE if form not in FUNCTION_FORMS]
SM_89 = parse_target("sm_89")


def random_spec(seed):
    """Any spec."""
    rng = random.Random(seed)
    spec = dict(
        rows=rng.choice(["gate|up", "up|gate", "interleaved", "interleaved_up", "separate", "plain"]),
        w_in_layout=rng.choice(["oi", "io"]),
        w_out_layout=rng.choice(["oi", "io"]),
        weight_on=rng.choice(["output", "output", "input"]),
        out_of_range=rng.choice(["nothing", "identity"]),
        combine=rng.choice(["slot", "expert"]),
        bias=rng.random() < 0.5,
        K=rng.choice([1, 2, 4]),
        out_norm_eps=rng.choice([None, None, 1e-5]),
        activation=rng.choice(ACTIVATIONS),
        alpha=1.3,
        up_offset=rng.choice([0.0, 1.0]),
    )
    for name in ("gate_max", "up_max", "act_max"):
        spec[name] = rng.choice([None, None, 0.4])
    for name in ("gate_min", "up_min", "act_min"):
        spec[name] = rng.choice([None, None, -0.3])
    return spec


def lowered(site, name):
    return session_of(model_of(site, by_name(name)))


@pytest.mark.parametrize("name", NAMES)
def test_random_specs_agree_with_the_reference(name):
    carried = 0
    for seed in range(16):
        site = make_site(seed=seed, **random_spec(seed))
        if by_name(name).refuses(site, "sm_89"):
            continue
        carried += 1
        model = model_of(site, by_name(name))
        assert check_graph(model, SM_89) == []
        session = session_of(model)
        for T in (0, 1, 64):
            args = tokens(site, T, seed=seed, beyond=0.15, negative=0.15)
            got, want = run(session, *args), exact(site, *args)
            assert got.shape == want.shape
            assert eps_off(got, want) <= BUDGET, (seed, T, str(site.spec))
    assert carried >= (9 if name == "dense" else 16)


@pytest.mark.parametrize("name", NAMES)
def test_routing_of_every_kind(name):
    site = make_site(E=6)
    session = lowered(site, name)
    x, ids, w = tokens(site, 70)
    same, pairs = torch.full_like(ids, 5), torch.arange(140).reshape(70, 2) % 2
    nobody = torch.full_like(ids, -1)
    assert not run(session, x, nobody, w).any()
    for routing in (torch.zeros_like(ids), same, pairs, torch.where(ids > 2, ids + 60, ids), nobody):
        assert eps_off(run(session, x, routing, w), exact(site, x, routing, w)) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_and_more_experts_than_pairs(name):
    for E, K, T in ((1, 3, 9), (40, 2, 1), (40, 2, 3)):
        site = make_site(E=E, K=K)
        args = tokens(site, T, beyond=0.2)
        assert eps_off(run(lowered(site, name), *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("weight_on", "scales"),
    [("output", (-1.0, 1e-38, 1e-20, 1e18)), ("input", (-1.0, 1e-3, 30.0))],  # on the input silu squares them
)
def test_weights_of_any_sign_and_size(name, weight_on, scales):
    site = make_site(K=1, weight_on=weight_on, bias=False)
    session = lowered(site, name)
    x, ids, w = tokens(site, 64)
    for scale in scales:
        want = exact(site, x, ids, w * scale)
        floor = abs(scale) if weight_on == "output" else scale**2
        assert eps_off(run(session, x, ids, w * scale), want, floor=floor) <= BUDGET, scale
    assert not run(session, x, ids, w * 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["x", "weight"])
def test_a_nan_stays_in_its_token(name, broken):
    site = make_site()
    session = lowered(site, name)
    x, ids, w = tokens(site, 9)
    want = exact(site, x, ids, w)
    (x if broken == "x" else w)[4, 1] = float("nan")
    got = run(session, x, ids, w)
    assert got[4].isnan().all()
    rest = [t for t in range(9) if t != 4]
    assert eps_off(got[rest], want[rest]) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [0, 3])
def test_an_expert_that_overflows_does_not_leak(name, broken):
    site = make_site(bias=False, out_of_range="identity")
    site.bank.w_out_l[broken].fill_(float("inf"))
    x, _, w = tokens(site, 6)
    ids = torch.tensor([[1, 1], [2, 4], [4, -1], [-1, 7], [1, 1], [-1, -1]])
    assert eps_off(run(lowered(site, name), x, ids, w), exact(site, x, ids, w)) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_dtypes_of_x_weights_and_result_may_differ(name, x_dtype):
    site = make_site(compute_dtype="float32", out_dtype="float16", accum_dtype="float32")
    site.dtype, site.weights_dtype = x_dtype, torch.float16
    args = tokens(site, 33)
    got = run(lowered(site, name), *args)
    assert got.dtype == torch.float16 and eps_off(got, exact(site, *args)) <= 1  # one rounding to float16


@pytest.mark.parametrize("name", NAMES)
def test_in_float16_throughout(name):
    """Every cast between the half and the wide dtypes is there: ONNX Runtime refuses a graph that mixes them."""
    site = make_site(dtype=torch.float16, out_norm_eps=1e-5, out_of_range="identity", act_dtype="float32")
    args = tokens(site, 33, beyond=0.1)
    assert eps_off(run(lowered(site, name), *args), exact(site, *args)) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_grow_with_the_experts(name):
    few, many = (len(list(model_of(make_site(E=E), by_name(name)).graph.all_nodes())) for E in (2, 200))
    assert few == many <= 90


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_read_before_the_model_is_written(name):
    site = make_site(bias=False)
    model = model_of(site, by_name(name))
    for e in range(5):
        site.bank.w_out_l[e].zero_()
    assert not run(session_of(model), *tokens(site, 4)).any()


@pytest.mark.parametrize("name", NAMES)
def test_names_begin_with_the_site(name):
    model = model_of(make_site(), by_name(name))
    named = [node.name for node in model.graph.all_nodes()] + list(model.graph.initializers)
    assert all(label.startswith("layers.0.mlp/") for label in named) and len(set(named)) == len(named)


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_different_sizes_are_refused(name):
    site = make_site()
    site.bank.w_out_l[2] = torch.zeros(12, 7)
    assert "expert 2 differs in size from expert 0" in by_name(name).refuses(site, "sm_89")


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_dropped_would_be_caught(name):
    """Sabotage: without one expert's bias the result is thousands of eps away, not tens."""
    site = make_site()
    args = tokens(site, 16)
    want = exact(site, *args)
    site.bank.b_out_l[0] = None
    assert eps_off(run(lowered(site, name), *args), want) > 1e4


def test_an_unknown_name_lists_the_names():
    assert {form.name for form in FORMS} == {*NAMES, "trt-moe"}
    with pytest.raises(UsageError, match="no TensorRT form is called 'unrolled'; the forms are trt-moe, dense"):
        by_name("unrolled")

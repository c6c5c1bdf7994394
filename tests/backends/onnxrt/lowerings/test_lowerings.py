"""What every lowering must do: the reference's numbers on random specs, and no leak between tokens or experts."""

import random

import pytest
import torch

from moeopt.backends.onnxrt.capability import check_graph
from moeopt.backends.onnxrt.lowerings import LOWERINGS, by_name
from moeopt.errors import UsageError
from moeopt.ir.specs import ACTIVATIONS, RouterSpec
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, model_of, run, session_of, tokens

BUDGET = 32  # eps of a row's largest entry (at least 1): 12 + 6 + 4 terms, |activation| below 4; 7 measured
NAMES = [lowering.name for lowering in LOWERINGS]
ROUTER = RouterSpec("softmax_topk", 2, 5)


def random_spec(seed):
    """Any spec; half of them with what the MoE kernel can do in the middle, so that each lowering is drawn often."""
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
        accum_dtype=rng.choice([None, None, "float64"]),
    )
    if rng.random() < 0.5:
        plain = spec["rows"] == "plain"
        spec["activation"] = rng.choice(["gelu_tanh", "identity", "silu"]) if plain else "silu"
        limit = rng.choice([None, 0.7])
        if limit and not plain:
            spec |= dict(gate_max=limit, up_min=-limit, up_max=limit, up_offset=1.0)
        return spec
    clamp = {name: rng.choice([None, None, 0.4]) for name in ("gate_max", "up_max", "act_max")}
    low = {name: rng.choice([None, None, -0.3]) for name in ("gate_min", "up_min", "act_min")}
    return spec | clamp | low | dict(activation=rng.choice(ACTIVATIONS), alpha=1.3, up_offset=rng.choice([0.0, 1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_random_specs_agree_with_the_reference(name):
    carried = 0
    for seed in range(40):
        site = make_site(seed=seed, router=ROUTER, **random_spec(seed))
        if by_name(name).refuses(site, "cpu"):
            continue
        carried += 1
        model = model_of(site, name)
        assert check_graph(model, "cpu") == []
        session = session_of(model)
        for T in (0, 1, 64):
            args = tokens(site, T, seed=seed, beyond=0.15, negative=0.15)
            got, want = run(session, *args), exact(site, *args)
            assert got.shape == want.shape
            assert eps_off(got, want) <= BUDGET, (seed, T, str(site.spec))
    assert carried >= {"unrolled": 40, "moe-masked-log": 3}.get(name, 8)


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_to_one_expert(name):
    site = make_site(E=6, router=RouterSpec("softmax_topk", 2, 6))
    session = session_of(model_of(site, name))
    x, ids, w = tokens(site, 7)
    for e in (0, 5):
        same = torch.full_like(ids, e)
        assert eps_off(run(session, x, same, w), exact(site, x, same, w)) <= BUDGET
    nobody = torch.full_like(ids, -1)
    assert not run(session, x, nobody, w).any()


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_zero_tiny_or_huge(name):
    site = make_site(K=3, E=6, router=RouterSpec("softmax_topk", 3, 6))
    session = session_of(model_of(site, name))
    x, ids, w = tokens(site, 64)
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:3] for t in range(64)])
    for scale in (1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30):
        scaled = w * scale
        want = exact(site, x, ids, scaled)
        assert eps_off(run(session, x, ids, scaled), want, floor=scale) <= BUDGET, scale
    mixed = w * torch.tensor([1.0, 0.0, 1e-30])
    assert eps_off(run(session, x, ids, mixed), exact(site, x, ids, mixed)) <= BUDGET
    assert not run(session, x, ids, w * 0).any()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "moe-masked-log"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_weights_that_are_negative(name, weight_on):
    site = make_site(K=1, weight_on=weight_on)
    x, ids, w = tokens(site, 64)
    w = w - 0.6
    assert (w < 0).any()
    assert eps_off(run(session_of(model_of(site, name)), x, ids, w), exact(site, x, ids, w)) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", ["x", "weight"])
def test_a_nan_stays_in_its_token(name, broken):
    site = make_site(router=ROUTER)
    session = session_of(model_of(site, name))
    x, ids, w = tokens(site, 9)
    want = exact(site, x, ids, w)
    (x if broken == "x" else w)[4, 1] = float("nan")
    got = run(session, x, ids, w)
    assert got[4].isnan().all()
    rest = [t for t in range(9) if t != 4]
    assert eps_off(got[rest], want[rest]) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_that_overflows_does_not_leak(name):
    site = make_site(router=ROUTER, bias=False)
    site.bank.w_out_l[3].fill_(float("inf"))
    x, ids, w = tokens(site, 9)
    ids = torch.tensor([[0, 1], [2, 4], [0, -1], [-1, 7], [1, 1]] + [[0, 2]] * 4)
    got = run(session_of(model_of(site, name)), x, ids, w)
    assert eps_off(got, exact(site, x, ids, w)) <= BUDGET


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_dtypes_of_x_weights_and_result_may_differ(name, x_dtype):
    kw = dict(compute_dtype="float32", out_dtype="float16", accum_dtype="float32")
    site = make_site(router=ROUTER, **kw)
    site.dtype, site.weights_dtype = x_dtype, torch.float16
    assert by_name(name).refuses(site, "cpu") == ""
    args = tokens(site, 33)
    got = run(session_of(model_of(site, name)), *args)
    assert got.dtype == torch.float16 and eps_off(got, exact(site, *args)) <= 1  # one rounding to float16


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_read_before_the_model_is_written(name):
    site = make_site(router=ROUTER)
    model = model_of(site, name)
    for e in range(5):
        site.bank.w_out_l[e].zero_()
        site.bank.b_out_l[e] = site.bank.b_out_l[e] if e == 1 else site.bank.b_out_l[e].zero_()
    assert not run(session_of(model), *tokens(site, 4)).any()


def test_names_begin_with_the_site():
    for name in NAMES:
        model = model_of(make_site(router=ROUTER), name)
        assert all(node.name.startswith("layers.0.mlp/") for node in model.graph)
        assert all(key.startswith("layers.0.mlp/") for key in model.graph.initializers)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(UsageError, match="no lowering is called 'fused'; the lowerings are unrolled, moe-masked-log"):
        by_name("fused")


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_refused_on_cpu(name):
    site = make_site(dtype=torch.bfloat16, router=ROUTER)
    reason = by_name(name).refuses(site, "cpu")
    assert "no bfloat16 MatMul" in reason or "computes in FLOAT, FLOAT16, not BFLOAT16" in reason


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_different_sizes_are_refused(name):
    site = make_site(router=ROUTER)
    site.bank.w_out_l[2] = torch.zeros(12, 7)
    assert "expert 2 differs in size from expert 0" in by_name(name).refuses(site, "cpu")


def test_a_float64_gelu_has_no_kernel():
    site = make_site(dtype=torch.float64, activation="gelu")
    assert "no float64 kernel for gelu" in by_name("unrolled").refuses(site, "cpu")


def test_a_sum_dropped_would_be_caught():
    """Sabotage: K - 1 terms instead of K are thousands of eps away, not tens."""
    site = make_site()
    x, ids, w = tokens(site, 16)
    got = run(session_of(model_of(site, "unrolled")), x, torch.cat([ids[:, :1], ids[:, :1] * 0 - 1], 1), w)
    assert eps_off(got, exact(site, x, ids, w)) > 1e4

"""The plan: which form for which sizes, tokens, memory and target, in words; and blocks verified through it."""

import pytest
import torch

from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.tensorrt.lowerings import by_name
from moeopt.backends.tensorrt.plan import TensorRTPlan
from moeopt.backends.tensorrt.target import GPU_BUILDS, RTX_BUILDS, parse_target
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.experts import experts
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, tokens

SIZES = dict(mixtral=(8, 4096, 14336, 2), qwen3=(128, 2048, 768, 8), deepseek_v3=(256, 7168, 2048, 8))


def plan(target, tokens=None, **given):
    return TensorRTPlan(parse_target(target), tokens, open_session=session_of, **given)


def sized(name, dtype=torch.float16, **spec):
    """A site with a real model's sizes and no weights."""
    E, H, I, K = SIZES[name]

    def tensor(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    bank = StackedExpertWeights([tensor(E, 2 * I, H)], tensor(E, H, I))
    return ExpertsNode(name, bank, ExpertsSpec(**spec), dtype, K, dtype, RouterSpec("softmax_topk", K, E))


@pytest.mark.parametrize(
    ("name", "tokens", "form"),
    [
        ("mixtral", (1,), "gather"),  # K experts of E
        ("mixtral", (128,), "dense"),  # all are hit, and a loop copies each
        ("mixtral", (4096,), "sort"),  # products take the time: K / E of dense's
        ("qwen3", (1,), "gather"),
        ("qwen3", (128,), "dense"),
        ("qwen3", (4096,), "sort"),
        ("deepseek_v3", (4096,), "sort"),
    ],
)
def test_the_choice_follows_the_tokens(name, tokens, form):
    assert plan("sm_89", tokens).choice(sized(name)).name == form


def test_the_choice_is_told_in_a_line():
    assert plan("sm_89", (128,)).why(sized("mixtral")) == (
        "dense, 96.27 MB of activations for 128 tokens, 4x the routed FLOPs, estimated 10.1 ms; "
        "next loop, 0.37 GB of activations for 128 tokens, 4x the routed FLOPs, estimated 29.2 ms"
    )


def test_the_bound_is_the_users_or_an_eighth_of_the_device():
    site = sized("qwen3")
    of_device = {c.name: c.reason for c in plan("sm_89", (4096,)).rank(site)}
    assert "dense" in of_device and "more than" not in of_device["dense"]
    assert "more than the bound of 3.00 GB (an eighth of the 24 GB of L4)" in of_device["gather"]
    small = plan("sm_89", (1, 4096), memory=100_000_000)
    ranked = small.rank(site)
    assert [c.name for c in ranked if c.lowering] == ["loop"]
    assert "more than the bound of 0.10 GB (as given)" in {c.name: c.reason for c in ranked}["dense"]
    assert plan("sm_89", (1,), max_tokens=4096, memory=100_000_000).choice(site).name == "loop"


def test_where_none_fits_the_least_is_taken_and_said_to_be_too_large():
    choice = plan("sm_89", (128,), memory=1).choice(sized("mixtral"))
    assert choice.name == "dense" and choice.reason.endswith(
        "more than the bound of 0.0 kB (as given), and the least there is"
    )


@pytest.mark.parametrize("sm", RTX_BUILDS + GPU_BUILDS)
def test_every_target_has_a_plan(sm):
    choice = plan(sm).choice(sized("mixtral"))
    assert choice.lowering is not None and (choice.name == "trt-moe") is (sm in (100, 103, 110))


@pytest.mark.parametrize(
    ("target", "site", "reason"),
    [
        ("sm_75", make_site(), "no TensorRT form carries its experts: sm_75 does not take matmuls in float32"),
        ("sm_75", make_site(dtype=torch.bfloat16), "Turing has no bfloat16; the nearest target that takes it is sm_80"),
        ("sm_89", make_site(accum_dtype="float64"), "reads float64 as float32 and does not say so"),
    ],
)
def test_dtypes_that_the_target_lacks_decline_the_block(target, site, reason):
    with pytest.raises(Declined, match=reason):
        plan(target).choice(site)
    with pytest.raises(Declined, match=reason):
        plan(target).check(site)


def test_trt_moe_is_replayed_by_the_next_form():
    site = sized("mixtral")
    p = plan("sm_100")
    assert p.choice(site).name == "trt-moe" and p.cpu_lowering(site).name == "dense"
    assert plan("sm_89").cpu_lowering(site) is plan("sm_89").lowering(site)
    gpt_oss = sized("mixtral", activation="swish", alpha=1.702, gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0)
    assert p.choice(gpt_oss).name == "dense"
    assert "activations silu and none, not swish" in {c.name: c.reason for c in p.rank(gpt_oss)}["trt-moe"]


@pytest.mark.parametrize("target", ["sm_89", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_are_verified_through_it(target, dtype):
    """Widened to float32, so one rounding to the result's dtype is left."""
    site = make_site(dtype=dtype)
    args = tokens(site, 9, beyond=0.1)
    p = plan(target)
    with p.run_through_backend():
        got = experts(*args, site.bank, site.spec)
    assert got.dtype == dtype
    assert eps_off(got, exact(site, *args)) <= (32 if dtype == torch.float32 else 1)
    assert p.demote("it differs")  # the next form is taken
    assert p.choice(site).name != "trt-moe" and p.notes[0].startswith("lowering ")


def test_forms_that_all_differ_decline_the_block():
    site = make_site()
    p = plan("sm_89")
    args = tokens(site, 4)
    taken = []
    while True:
        with p.run_through_backend():
            experts(*args, site.bank, site.spec)
        taken.append(p.choice(site).name)
        if not p.demote("it differs"):
            break
    assert sorted(taken) == ["dense", "gather", "loop", "sort"]


@pytest.mark.parametrize("form", ["dense", "loop", "gather", "sort", "trt-moe"])
def test_work_grows_with_the_tokens(form):
    few, many = (by_name(form).cost(sized("qwen3"), T, "sm_89") for T in (16, 2048))
    assert few.memory < many.memory and few.flops < many.flops and few.moved < many.moved
    assert by_name(form).cost(sized("qwen3"), 0, "sm_89") == by_name(form).cost(sized("qwen3"), 1, "sm_89")

"""Blocks of the zoo and of real families in every form: the tokens and routing that reach them, run by ONNX Runtime.

The default run takes ``ZOO`` and ``SAMPLE``, and builds the planned form of ``BUILT`` for sm_89; ``MOEOPT_NIGHTLY=1``
takes all models, and builds every form.
"""

import functools
import os

import onnx_ir as ir
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.tensorrt.graph_check import check_graph
from moeopt.backends.tensorrt.lowerings import PORTABLE
from moeopt.backends.tensorrt.lowerings.trt_moe import TrtMoE
from moeopt.backends.tensorrt.plan import TensorRTPlan
from moeopt.backends.tensorrt.target import parse_target
from moeopt.errors import MoeoptError
from moeopt.lower.onnx.assemble import one_op
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.plan import kind
from moeopt.lower.onnx.upcast import upcast_node
from moeopt.ops.override import override_experts_impl
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact
from tests.backends.tensorrt.built import build_site
from tests.backends.tensorrt.network import check_networks
from tests.families import FAMILIES
from tests.zoo import CASES

NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
SM_89 = parse_target("sm_89")
ZOO = """
    act_clamped_gpt_oss act_gelu_erf act_up_times_gate capacity_gshard_ample dtype_bfloat16_float32_accumulator
    hit_sentinel_ids hit_stacked_experts layout_hidden_is_twice_inter_in_out act_tanh
""".split()
SAMPLE = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "olmoe")
NO_BLOCK = {"nllb-moe"}  # declined: its router feeds a one-hot mask where ids are expected
BUILT = ("deepseek_v3", "gpt_oss", "llama4_text")
BUDGET = 32  # eps of a row's largest entry: sums of up to 64 + 64 + K terms; 5.2 measured over the sample


@functools.cache
def calls(name, family):
    """One (site, x, ids, weights) of each kind of expert op in a rewritten model, as its own inputs reach it."""
    if family:
        model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
        args, kwargs = (), dict(inputs, use_cache=False)
    else:
        model, (args, kwargs) = CASES[name].build(), CASES[name].inputs()
    try:
        optimized = moeopt.optimize(model, kwargs or args, verify="off")
    except MoeoptError:
        return []
    if all(block.status == "declined" for block in optimized.report.blocks):
        return []
    found = {}

    def look(x, ids, weights, bank, spec):
        if bank.num_experts > 1:
            site = ExpertsNode(f"block.{len(found)}", bank, spec, x.dtype, int(ids.shape[1]), weights.dtype)
            found.setdefault(kind(site), (site, x.detach().clone(), ids.to(torch.int64), weights.detach().clone()))

    with torch.no_grad(), override_experts_impl(look):
        optimized.model(*args, **kwargs)
    return list(found.values())


def check(site, x, ids, weights, form):
    """``form``, widened to float32, against the definition in float64; one rounding of the result is left."""
    wide = upcast_node(site)
    feeds = {"x": x.to(wide.dtype), "ids": ids, "weights": weights.to(wide.weights_dtype)}
    got = session_of(wide, form).run(feeds)[0]
    want = exact(site, x, ids, weights)
    assert eps_off(got, want.detach(), floor=1e-3) <= BUDGET, (form.name, str(site.spec))


def refused(site, form):
    return form.refuses(site, "sm_89") or (site.dtype == torch.float64 and "TensorRT has no float64")


@pytest.mark.parametrize("name", sorted(CASES) if NIGHTLY else ZOO)
def test_zoo_blocks_in_every_form(name):
    found = calls(name, False)
    assert found or NIGHTLY
    for call in found:
        for form in PORTABLE:
            if not refused(call[0], form):
                assert check_graph(one_op(call[0], form), SM_89) == []
                check(*call, form)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_BLOCK) if NIGHTLY else SAMPLE)
def test_family_blocks_in_every_form(name):
    pytest.importorskip("transformers")
    if not FAMILIES[name].available:
        pytest.skip(f"{name} needs transformers {'.'.join(map(str, FAMILIES[name].min_version))}")
    found = calls(name, True)
    assert found
    for call in found:
        for form in PORTABLE:
            if not refused(call[0], form):
                check(*call, form)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_BLOCK) if NIGHTLY else BUILT)
def test_family_blocks_are_built(name):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("transformers")
    if not FAMILIES[name].available:
        pytest.skip(f"{name} needs transformers {'.'.join(map(str, FAMILIES[name].min_version))}")
    for site, *_ in calls(name, True):
        planned = TensorRTPlan(SM_89, open_session=session_of).lowering(site)
        for form in PORTABLE if NIGHTLY else (planned,):
            if not refused(site, form):
                assert build_site(site, form).activation_bytes


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_BLOCK) if NIGHTLY else SAMPLE)
def test_family_blocks_are_networks_for_sm_100(name, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("transformers")
    if not FAMILIES[name].available:
        pytest.skip(f"{name} needs transformers {'.'.join(map(str, FAMILIES[name].min_version))}")
    for site, *_ in calls(name, True):
        reason = TrtMoE().refuses(site, "sm_100")
        if name in SAMPLE:
            assert ("not swish" in reason) if name == "gpt_oss" else not reason
        if not reason:
            ir.save(one_op(site, TrtMoE()), tmp_path / "model.onnx")
            assert check_networks(trt, tmp_path / "model.onnx", [site]) == []

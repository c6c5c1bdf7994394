"""What com.microsoft::MoE carries and what it is refused, each refusal by its words."""

import dataclasses

import pytest
import torch

from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.moe_kernel import kernel_activation
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of, renamed

ROUTER = RouterSpec("softmax_topk", 2, 5)


@pytest.mark.parametrize(
    ("changes", "provider", "reason"),
    [
        (dict(activation="gelu"), "cpu", "has no such activation and clamps"),
        (dict(rows="plain", activation="gelu"), "cpu", "has no such activation and clamps"),
        (dict(act_max=1.0), "cpu", "has no such activation and clamps"),
        (dict(gate_max=1.0), "cpu", "has no such activation and clamps"),
        (dict(gate_max=1.0, up_min=-2.0, up_max=2.0), "cpu", "has no such activation and clamps"),
        (dict(rows="plain", gate_max=1.0), "cpu", "has no such activation and clamps"),
        (dict(rows="plain", activation="relu"), "cpu", "relu of NaN is 0 in this kernel"),
        (dict(D=20), "cpu", "as wide as its input; here 12 becomes 20"),
        (dict(K=6), "cpu", "picks k <= E experts; here k is 6 of 5"),
        (dict(dtype=torch.float64), "cpu", "computes in FLOAT, FLOAT16, not DOUBLE"),
        (dict(act_dtype="float16"), "cpu", "activations run in torch.float16"),
        ({}, "tensorrt", "tensorrt has no com.microsoft::MoE kernel (source: the parser refuses it)"),
        ({}, "nv_tensorrt_rtx", "the parser refuses it"),
        ({}, "dml", "dml has no com.microsoft::MoE kernel"),
    ],
    ids=lambda x: renamed(x) if isinstance(x, dict) else str(x)[:20],
)
def test_both_forms_refuse(changes, provider, reason):
    site = make_site(router=ROUTER, **changes)
    for name in ("moe-masked-log", "moe-expand"):
        assert reason in by_name(name).refuses(site, provider)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(weight_on="input"), "the kernel multiplies the output"),
        (dict(out_of_range="identity"), "ids beyond the experts add the token itself"),
        (dict(out_norm_eps=1e-5), "a norm follows each expert"),
        (dict(accum_dtype="float64"), "the sum runs in torch.float64"),
        (dict(router=None), "no softmax router was recognised"),
    ],
    ids=lambda x: renamed(x) if isinstance(x, dict) else "",
)
def test_masked_log_refuses_what_expand_carries(changes, reason):
    site = make_site(**{"router": ROUTER, **changes})
    refusal = by_name("moe-masked-log").refuses(site, "cpu")
    assert reason in refusal and "moe-expand" in refusal
    assert by_name("moe-expand").refuses(site, "cpu") == ""


def test_cuda_carries_bfloat16_and_relu():
    site = make_site(router=ROUTER, dtype=torch.bfloat16, rows="plain", activation="relu", H=16, I=24)
    assert by_name("moe-masked-log").refuses(site, "cuda") == ""


def test_cuda_takes_whole_steps_of_128_bits():
    def why(**changes):
        return by_name("moe-masked-log").refuses(make_site(router=ROUTER, **{"H": 16, "I": 16, **changes}), "cuda")

    assert why(I=20) == "" and why(dtype=torch.bfloat16) == ""
    assert why(I=20, dtype=torch.float16) == "20 is not a width that cuda's MoE takes: 16 or more, in steps of 8"
    assert why(H=12) == "12 is not a width that cuda's MoE takes: 16 or more, in steps of 4"
    assert why(I=18) == "18 is not a width that cuda's MoE takes: 16 or more, in steps of 4"


def test_the_attributes_say_the_activation():
    gpt_oss = ExpertsSpec(
        rows="interleaved", activation="swish", alpha=1.702, gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0
    )
    assert kernel_activation(gpt_oss) == {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.702,
        "activation_beta": 1.0,
        "swiglu_limit": 7.0,
    }
    assert kernel_activation(ExpertsSpec(rows="plain", activation="gelu_tanh")) == {"activation_type": "gelu"}
    assert kernel_activation(dataclasses.replace(gpt_oss, up_min=None)) is None


def test_one_node_whatever_the_experts():
    for E in (4, 32):
        nodes = list(model_of(make_site(E=E, router=RouterSpec("softmax_topk", 2, E)), "moe-masked-log").graph)
        assert sum(node.op_type == "MoE" for node in nodes) == 1 and len(nodes) <= 24

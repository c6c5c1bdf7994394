"""What is emitted for CUDA, without CUDA: the MoE node, its layout and dtypes; and the CPU fallback graph's numbers."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx_ir as ir

import moeopt
from moeopt.backends.onnxrt.capability import capability, check_graph
from moeopt.backends.onnxrt.known_answer import known_answer_test, make_probe
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.plan import OrtPlan, session_of
from moeopt.backends.onnxrt.replay import check_emitted
from moeopt.backends.onnxrt.select import estimate
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.lower.onnx.assemble import one_op
from tests.backends.onnxrt.lowerings.one_site import make_site

pytestmark = pytest.mark.one_isa  # what is emitted for CUDA

H, I = 32, 48
GPT_OSS = ExpertsSpec(
    rows="interleaved", w_in_layout="io", w_out_layout="io", activation="swish", alpha=1.702,
    gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0,
)  # fmt: skip
FAMILIES = {
    "home-made": dict(spec=ExpertsSpec(rows="separate"), E=4, K=2, bias=True),
    "mixtral": dict(spec=ExpertsSpec(rows="gate|up"), E=8, K=2, bias=False),
    "qwen3-moe": dict(spec=ExpertsSpec(rows="gate|up"), E=16, K=4, bias=False),
    "gpt-oss": dict(spec=GPT_OSS, E=8, K=4, bias=True),
}
DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


def site_of(family, dtype):
    given = FAMILIES[family]
    return make_site(**given, H=H, I=I, dtype=dtype, router=RouterSpec("softmax_topk", given["K"], given["E"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_moe_node_in_the_layout_and_dtype_of_cuda(family, dtype, tmp_path):
    site, plan = site_of(family, dtype), OrtPlan("cuda")
    assert plan.legalize(site) is site, "CUDA computes in the model's dtype"
    model = one_op(site, plan.lowering(site))
    (node,) = (n for n in model.graph if n.op_type == "MoE")
    E, K = FAMILIES[family]["E"], FAMILIES[family]["K"]
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values["activation_type"] == "swiglu" and values["swiglu_fusion"] == 1 and values["k"] == K
    assert values["normalize_routing_weights"] == 1 and "use_sparse_mixer" not in values
    assert [tuple(node.inputs[i].shape) for i in (2, 4)] == [(E, 2 * I, H), (E, H, I)]
    assert {node.inputs[i].dtype.name for i in (2, 4)} == {DTYPES[dtype]}
    biases = [value is not None for value in node.inputs[3:6:2]]
    assert biases == ([True] * len(biases) if FAMILIES[family]["bias"] else [False] * len(biases))
    assert check_graph(model, "cuda") == []
    model.graph.outputs[0].shape = ir.Shape(["T", H])
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    check_emitted(ir.load(tmp_path / "model.onnx"), str(tmp_path / "model.onnx"), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_portable_form_is_within_the_budget(family, dtype):
    site, plan = site_of(family, dtype), OrtPlan("cpu")
    probe, budget = make_probe(site)
    wide = plan.legalize(site)
    assert check_graph(one_op(wide, plan.lowering(site)), "cpu") == []
    probe = {name: t.float() if t.dtype in DTYPES else t for name, t in probe.items()}
    assert known_answer_test(session_of(wide, plan.lowering(site)), probe, ("x", "ids", "weights"), budget) == ""


def test_a_weight_of_another_dtype_is_reported():
    site = site_of("mixtral", torch.float16)
    model = one_op(site, OrtPlan("cuda").lowering(site))
    (node,) = (n for n in model.graph if n.op_type == "MoE")
    node.inputs[4].type = ir.TensorType(ir.DataType.FLOAT)
    (problem,) = check_graph(model, "cuda")
    assert "its inputs are FLOAT and FLOAT16, and MoE takes one dtype" in problem


def test_widths_that_the_kernel_refuses_are_reported():
    site = make_site(E=4, K=2, H=16, I=18, router=RouterSpec("softmax_topk", 2, 4))
    model = one_op(site, by_name("moe-masked-log"))
    (problem,) = check_graph(model, "cuda")
    assert "18 is not a width that cuda's MoE takes: 16 or more, in steps of 4" in problem
    assert OrtPlan("cuda").lowering(site).name in ("dense", "unrolled"), "another form takes its place"


def test_cuda_prefers_one_kernel_to_many_nodes():
    site = site_of("qwen3-moe", torch.bfloat16)
    for tokens in (1, 16, 512):
        kernel, unrolled = (estimate(site, by_name(n), tokens, "cuda") for n in ("moe-masked-log", "unrolled"))
        assert kernel < unrolled
    assert OrtPlan("cuda").choice(site).name == "moe-masked-log"


def test_the_table_says_that_cuda_was_read_and_not_run():
    assert capability("cuda", "MoE").evidence.startswith("source")


@pytest.mark.slow
def test_a_language_model_for_cuda():
    """In bfloat16, with its cache: fused for CUDA as transformers' exporter does it, verified through its CPU form."""
    pytest.importorskip("transformers.exporters")
    import onnx

    from moeopt.errors import EngineNotExecutableError
    from tests.families.build import FAMILIES as MODELS

    family = MODELS["qwen3_moe"]
    done = moeopt.optimize(
        family.build().to(torch.bfloat16), family.inputs(), backend="onnxruntime", target="cuda", verify="fast"
    )
    assert done.certificate.passed and not done.certificate.executed, str(done.certificate)
    path = Path(done.model.directory) / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    assert sum(n.op_type == "MoE" for n in graph.node) == family.moe_blocks
    bfloat16, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    assert {t.data_type for t in graph.initializer if len(t.dims) == 3} == {bfloat16}
    assert {v.type.tensor_type.elem_type for v in graph.output} <= {bfloat16, float32}
    with pytest.raises(EngineNotExecutableError, match="the engine was built for cuda"):
        done.generate(family.inputs()["input_ids"])

"""`portable=True`: ONNX's own operators only, in whatever the model holds; OpenVINO, where it is, computes the same."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import onnx_ir

import moeopt
from moeopt.backends.onnxrt.portable import check_portable
from tests.families.build import FAMILIES
from tests.toy_moe import Block, H

pytestmark = pytest.mark.one_isa  # which operators a graph has


def foreign(folder):
    """Operators of a bundle's graph that ONNX does not define, and domains that the graph names."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = list(graph.graph.node)
    for node in nodes:
        nodes += [n for a in node.attribute for g in (*a.graphs, a.g) for n in g.node]
    (opset,) = graph.opset_import
    return {n.op_type for n in nodes if n.domain or not onnx.defs.has(n.op_type, opset.version, "")}, opset.domain


def lm(**options):
    pytest.importorskip("transformers.exporters")
    family = FAMILIES["qwen3_moe"]
    model = family.build()
    return model, moeopt.optimize(model, family.inputs(), backend="onnxruntime", verify="fast", **options)


@pytest.fixture(scope="module")
def portable_lm(tmp_path_factory):
    model, engine = lm(portable=True)
    assert engine.certificate.passed
    return model, engine.save(tmp_path_factory.mktemp("portable") / "bundle")


def test_onnx_reads_a_bundle_while_the_process_that_saved_it_lives(portable_lm):
    onnx.load(portable_lm[1] / "model.onnx")  # with its weights: it refuses a file of two names


def test_a_language_model_is_not_fused(portable_lm, tmp_path):
    assert foreign(portable_lm[1]) == (set(), "")
    assert not (portable_lm[1] / "model.native.onnx").exists()
    other = lm()[1].save(tmp_path / "other")
    graph = onnx.load(other / "model.onnx", load_external_data=False).graph
    assert {n.domain for n in graph.node} > {""} or {n.op_type for n in graph.node} & {"SimplifiedLayerNormalization"}


def test_a_block_has_no_kernel_of_onnx_runtime(tmp_path):
    torch.manual_seed(0)
    engine = moeopt.optimize(Block().eval(), torch.randn(6, H), backend="onnxruntime", portable=True, verify="fast")
    assert foreign(engine.save(tmp_path / "bundle")) == (set(), "")
    assert "unrolled" in engine.report.blocks[0].lowering and "native" not in engine.report.blocks[0].lowering


def test_an_operator_without_another_form_is_named():
    def check(op, domain):
        nodes = [onnx_ir.node(op, [], domain=domain, name="act")]
        check_portable(onnx_ir.Model(onnx_ir.Graph([], [], nodes=nodes, opset_imports={"": 20}), ir_version=10))

    with pytest.raises(
        moeopt.NotSaveableError, match=r"portable=True: com.microsoft::Gelu \(node act\) is no operator"
    ):
        check("Gelu", "com.microsoft")
    with pytest.raises(
        moeopt.NotSaveableError, match=r"SimplifiedLayerNormalization \(.* of ONNX 20, .* leave portable"
    ):
        check("SimplifiedLayerNormalization", "")
    check("Gelu", "")


@pytest.mark.parametrize(("given", "message"), [
    ({"backend": "torch", "portable": True}, "portable=True is for an engine, and backend='torch' builds none"),
    ({"backend": "onnxruntime", "portable": "yes"}, "portable='yes': it must be True or False"),
])  # fmt: skip
def test_what_it_does_not_go_with(given, message):
    with pytest.raises(moeopt.UsageError, match=message):
        moeopt.optimize(Block().eval(), torch.randn(6, H), **given)


def test_openvino_computes_the_same(portable_lm):
    openvino = pytest.importorskip("openvino")
    model, folder = portable_lm
    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids = np.array([[5, 6, 7, 8]])
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 4), np.int64), "position_ids": np.arange(4)[None]}
    feeds["logits_to_keep"] = np.arange(4)
    past = [f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")]
    feeds |= {name: np.zeros((1, 2, 0, 8), np.float32) for name in past}
    got = compiled(feeds)["logits"]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(ids)).logits.numpy()
    assert abs(got - wanted).max() < 2e-5

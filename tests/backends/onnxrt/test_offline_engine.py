"""Without a GPU an engine for one is built, checked and replayed; it says so wherever it is asked for more."""

import copy
import importlib.metadata
import json
import pickle
import shutil
import sys

import pytest
import torch

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.backends.onnxrt import session as sessions
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.replay import ReplayPlan, check_emitted
from moeopt.errors import BundleError, Declined, EngineNotExecutableError, NotSaveableError, UsageError
from tests.backends.onnxrt.lowerings.one_site import make_site
from tests.backends.onnxrt.toys import edit, reseal
from tests.toy_moe import Block, build, close, seeded

H = 16
CALL = seeded(3, 8, H)
DEVICE = "onnxruntime cuda (built, not executed; replayed on cpu)"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here: tests/gpu runs these engines"),
    pytest.mark.one_isa,  # engines for a GPU
]


def engine_for(target, block=Block, **options):
    return moeopt.optimize(build(block), CALL, backend="onnxruntime", target=target, **{"verify": "fast", **options})


@pytest.fixture(scope="module")
def built():
    return engine_for("cuda")


@pytest.fixture(scope="module")
def pristine(built, tmp_path_factory):
    return built.save(tmp_path_factory.mktemp("cuda") / "b")


def test_the_certificate_speaks_of_a_replay(built):
    certificate = built.certificate
    assert certificate.passed and not certificate.executed and certificate.device == DEVICE
    text = " ".join(str(certificate).split())
    assert "engine: not executed; the verdict is that of a replay" in text and DEVICE in text
    assert certificate.end_to_end.passed and [b.passed for b in certificate.blocks] == [True]
    assert json.loads(certificate.to_json())["executed"] is False
    assert "onnxruntime moe-masked-log" in built.report.blocks[0].lowering


def test_a_call_says_what_it_needs_and_the_way_out(built, pristine):
    there = "this machine has: cpu"
    with pytest.raises(EngineNotExecutableError, match=f"was built for cuda.*, and {there}. To run it, save it with"):
        built(CALL)
    with pytest.raises(EngineNotExecutableError, match=f"{there}. To run it, copy {pristine} there and call moeopt.l"):
        moeopt.load(pristine)(CALL)
    with pytest.raises(
        EngineNotExecutableError, match="moeopt.verify of the directory replays its CPU fallback graph here"
    ):
        built(CALL)
    assert not hasattr(built, "generate")


def test_the_bundle_holds_both_forms(pristine):
    names = {path.name for path in pristine.iterdir()}
    assert {"model.onnx", "model.onnx.data", "fallback.onnx", "fallback.onnx.data"} <= names
    manifest = json.loads((pristine / "moeopt.json").read_text())
    assert manifest["provider"] == "cuda" and manifest["lowerings"] == {"experts": "moe-masked-log"}
    assert set(manifest["portable"]["lowerings"]) == {"experts"}


def test_verify_replays(pristine):
    for provider in (None, "cpu"):
        certificate = moeopt.verify(pristine, provider=provider)
        assert certificate.passed and not certificate.executed and certificate.device == DEVICE
    inputs = seeded(2, 5, H, seed=9)
    certificate = moeopt.verify(pristine, original=build(), inputs=inputs)
    assert certificate.passed and not certificate.executed and certificate.end_to_end.tokens == 10
    wrong = build()
    torch.nn.init.normal_(wrong.experts[0].w2.weight)
    assert moeopt.verify(pristine, original=wrong, inputs=inputs).passed is False


def test_verify_of_what_optimize_returned(built):
    certificate = moeopt.verify(built, original=build())
    assert certificate.passed and not certificate.executed and certificate.device == DEVICE


def test_an_absent_provider_that_is_asked_for(pristine):
    for call in (lambda: moeopt.verify(pristine, provider="cuda"), lambda: moeopt.load(pristine, "cuda")):
        with pytest.raises(UsageError, match="provider 'cuda' is not on this machine; it has: cpu"):
            call()


def test_the_portable_form_can_be_run(pristine):
    engine = moeopt.load(pristine, "cpu")
    x = seeded(1, 11, H, seed=3)
    with torch.no_grad():
        close(engine(x), build()(x))
    assert engine.provider == "cpu"


def test_copies_and_pickles(built, pristine):
    engine = moeopt.load(pristine)
    for twin in (copy.copy(engine), copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert repr(twin) == f"<moeopt engine {pristine} for cuda, not on this machine>"
    assert copy.deepcopy(built).model is built.model and engine.certificate["executed"] is False
    with pytest.raises(UsageError, match="lies in a temporary folder and cannot be pickled: save it with .save"):
        pickle.dumps(built.model)


def test_a_device_that_is_not_here():
    with pytest.raises(UsageError, match="provider 'cuda' is not on this machine; it has: cpu. target='cuda' instead"):
        moeopt.optimize(build(), CALL, backend="onnxruntime", device="cuda")


def test_nothing_is_measured_for_an_absent_target():
    with pytest.raises(UsageError, match="tune=True measures on this machine, which has: cpu; build for target='cuda'"):
        engine_for("cuda", tune=True)


def test_an_unknown_target():
    with pytest.raises(UsageError, match="provider 'rocm' is unknown; the providers are cpu, cuda, tensorrt, nv_tens"):
        engine_for("rocm")


def test_the_target_that_is_this_machine():
    done = engine_for("cpu", verify="off")
    assert done.certificate.executed and done(CALL).shape == CALL.shape


def test_tensorrt_takes_the_dense_form():
    done = engine_for("tensorrt")
    assert done.certificate.passed and not done.certificate.executed
    assert "onnxruntime dense" in done.report.blocks[0].lowering


def test_tensorrt_declines_what_none_of_its_forms_carries():
    with pytest.raises(Declined) as err:
        ReplayPlan(OrtPlan("nv_tensorrt_rtx")).check(make_site(E=17))
    for reason in (
        "no ONNX Runtime form carries its experts on nv_tensorrt_rtx",
        "dense computes every expert; 17 are more than 16",
        "nv_tensorrt_rtx has no com.microsoft::MoE kernel",
        "TensorRT does not split a tensor",
    ):
        assert reason in err.value.reason


def test_a_graph_that_the_provider_would_not_honour_is_not_kept(built):
    import onnx_ir

    path = built.model.directory / "model.onnx"
    model = onnx_ir.load(path)
    check_emitted(model, str(path), "cuda")
    (node,) = (n for n in model.graph if n.op_type == "MoE")
    node.attributes["swiglu_fusion"] = onnx_ir.AttrInt64("swiglu_fusion", 2)
    with pytest.raises(NotSaveableError, match="the graph for cuda is not one that it runs: .*swiglu_fusion=2 is refu"):
        check_emitted(model, str(path), "cuda")


def test_a_graph_that_onnx_itself_refuses_is_not_kept(tmp_path):
    import onnx_ir

    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(["T", 4]))
    node = onnx_ir.node("Relu", [x, x])
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", x.type, x.shape
    model = onnx_ir.Model(
        onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10
    )
    onnx_ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(NotSaveableError, match="not one that it runs: Node.*Relu.* has input size 2 not in range"):
        check_emitted(model, str(tmp_path / "model.onnx"), "cuda")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["model.onnx", "fallback.onnx"])
def test_either_form_is_checked_before_it_is_used(name, pristine, tmp_path):
    bundle = shutil.copytree(pristine, tmp_path / "b")
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-7])
    with pytest.raises(BundleError, match=f"{name}: it has .* bytes, and the manifest says"):
        moeopt.load(bundle)
    with pytest.raises(BundleError, match=f"{name}: it is not an ONNX graph"):
        moeopt.load(reseal(bundle))


def test_a_bundle_of_a_version_that_called_the_fallback_graph_portable(pristine, tmp_path):
    import onnx

    bundle = shutil.copytree(pristine, tmp_path / "b")
    graph = onnx.load(bundle / "fallback.onnx", load_external_data=False)
    for entry in [e for t in graph.graph.initializer for e in t.external_data if e.key == "location"]:
        entry.value = "portable.onnx.data"
    (bundle / "fallback.onnx").write_bytes(graph.SerializeToString())
    for path in list(bundle.glob("fallback.*")):
        path.rename(bundle / path.name.replace("fallback", "portable"))
    edit(bundle / "moeopt.json", _as_it_was_called)
    reseal(bundle)
    assert moeopt.verify(bundle).passed
    y = moeopt.load(bundle, device="cpu")(CALL)
    torch.testing.assert_close(y, moeopt.load(pristine, device="cpu")(CALL), rtol=0, atol=0)


def _as_it_was_called(data):
    data["files"] = {name.replace("fallback", "portable"): about for name, about in data["files"].items()}


def test_a_manifest_that_does_not_describe_the_portable_form(pristine, tmp_path):
    bundle = shutil.copytree(pristine, tmp_path / "b")
    edit(bundle / "moeopt.json", lambda data: data.update(portable=[]))
    with pytest.raises(BundleError, match="the manifest does not describe fallback.onnx"):
        moeopt.verify(bundle)


class FakeNode:
    def __init__(self, op_type, domain=""):
        self.op_type, self.domain, self.name = op_type, domain, f"the_{op_type.lower()}"


class FakeSession:
    """What a session on a GPU machine says of itself: its providers, and the nodes that the CPU got."""

    def __init__(self, *on_cpu, provider="CUDAExecutionProvider"):
        self.on_cpu, self.provider = on_cpu, provider

    def get_providers(self):
        return [self.provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        parts = {"CPUExecutionProvider": self.on_cpu, "CUDAExecutionProvider": [FakeNode("MoE", "com.microsoft")]}
        return [type("Part", (), dict(ep_name=name, get_nodes=lambda s, n=nodes: n))() for name, nodes in parts.items()]


def test_where_nodes_may_run():
    sessions.check_placement(FakeSession(FakeNode("Shape"), FakeNode("Gather")), "cuda")
    with pytest.raises(
        EngineNotExecutableError, match=r"no kernel for the_moe \(com.microsoft.MoE\), and the CPU would"
    ):
        sessions.check_placement(FakeSession(FakeNode("MoE", "com.microsoft")), "cuda")
    with pytest.raises(EngineNotExecutableError, match=r"no kernel for the_matmul \(ai.onnx.MatMul\) and 1 more nodes"):
        sessions.check_placement(FakeSession(FakeNode("MatMul"), FakeNode("TopK")), "cuda")
    with pytest.raises(EngineNotExecutableError, match="does not start on this machine, and ONNX Runtime took CPUExec"):
        sessions.check_placement(FakeSession(provider="CPUExecutionProvider"), "cuda")
    old = type("Old", (), dict(get_providers=lambda self: ["CUDAExecutionProvider"]))()
    with pytest.raises(EngineNotExecutableError, match="does not tell which provider runs a node: upgrade onnxruntime"):
        sessions.check_placement(old, "cuda")


def test_two_runtimes_at_once(monkeypatch):
    homes = {"onnxruntime": "/a/site-packages", "onnxruntime-gpu": "/a/site-packages"}

    class Installed:
        def __init__(self, name):
            self.name = name

        def locate_file(self, path):
            return homes[self.name]

    real = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", lambda n: Installed(n) if n in homes else real(n))
    with pytest.raises(UsageError, match="are both installed in /a/site-packages and overwrite each other's files"):
        engine_for("cpu")
    homes["onnxruntime-gpu"] = "/b"  # first on the path: the other one's files are not touched
    assert sessions.runtime().__name__ == "onnxruntime"


def test_a_gpu_build_without_a_gpu_claims_only_the_cpu(monkeypatch):
    everything = list(sessions.PROVIDERS.values())
    monkeypatch.setattr(sessions.runtime(), "get_available_providers", lambda: everything)
    assert sessions.available() == ["cpu"]


@pytest.mark.parametrize(
    "version, refused", [("1.30.0", True), ("1.9.2", True), ("1.31.0", False), ("1.33rc1", False), ("2.0.1", False)]
)
def test_a_runtime_that_is_too_old_is_refused_before_it_runs(version, refused, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", version)
    if not refused:
        assert sessions.runtime().__version__ == version
        return
    with pytest.raises(UsageError, match=rf"needs ONNX Runtime 1.31 or newer \(TopK .* and {version} is installed: "):
        moeopt.optimize(build(), torch.randn(3, 16), backend="onnxruntime")


@pytest.mark.parametrize(
    "python, way", [((3, 10, 13), "use a newer Python, or backend='torch'"), ((3, 11), "pip install")]
)
def test_the_way_to_a_runtime_is_one_that_this_python_has(python, way, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.30.0")
    monkeypatch.setattr(sys, "version_info", python)
    with pytest.raises(UsageError, match=way):
        sessions.runtime()

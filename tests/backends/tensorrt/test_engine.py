"""A TensorRT engine is built, checked, saved and replayed with no GPU, and says so wherever it is asked for more.

Where there is a GPU that runs it, stand-ins play it here: ONNX Runtime's CPU in the place of the plan.
"""

import copy
import json
import pickle
import shutil
import sys

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'moeopt[tensorrt]'")
pytest.importorskip("onnxscript")

import moeopt
from moeopt.backends.onnxrt.session import Session
from moeopt.backends.tensorrt import bundle as trt_bundle
from moeopt.backends.tensorrt import engine as trt_engine
from moeopt.backends.tensorrt.runtime import Machine
from moeopt.bundle.manifest import read_manifest
from moeopt.errors import (
    BundleError,
    EngineBuildError,
    EngineNotExecutableError,
    NotEquivalentError,
    NotSaveableError,
    UsageError,
)
from moeopt.testing import assert_equivalent, check_bundle, providers
from tests.backends.onnxrt.toys import edit, reseal
from tests.toy_moe import Block, build, close, seeded

H = 16
CALL = seeded(3, 8, H)
DEVICE = "tensorrt_rtx sm_89 (built, not executed; replayed on cpu)"
GONE = "it needs a GPU of compute capability 8.9, and this machine has none"


def engine_for(target="sm_89", block=Block, call=CALL, **options):
    return moeopt.optimize(build(block), call, backend="tensorrt", target=target, **{"verify": "fast", **options})


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Also on a machine that has one: tests/gpu runs engines there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def built():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return engine_for()


@pytest.fixture(scope="module")
def pristine(built, tmp_path_factory):
    return built.save(tmp_path_factory.mktemp("trt") / "b")


@pytest.fixture
def bundle(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "b")


def test_the_certificate_speaks_of_a_replay(built):
    certificate = built.certificate
    assert certificate.passed and not certificate.executed and certificate.device == DEVICE
    assert "engine: not executed; the verdict is that of a replay" in str(certificate)
    assert certificate.end_to_end.passed and [b.passed for b in certificate.blocks] == [True]


def test_the_report_has_the_form_the_layers_and_the_memory(built):
    (block,) = built.report.blocks
    assert block.lowering.startswith("tensorrt_rtx sm_89 dense, ") and block.lowering.endswith(" layers")
    note, *others = built.report.notes
    assert all(other.startswith("tied rows") for other in others)
    assert note.startswith("engine.plan for sm_89 by tensorrt_rtx 1.7") and "gemm 3" in note
    assert "MB of activations at most" in note and built.report.backend == "tensorrt"


def test_a_call_says_what_it_needs_and_the_way_out(built, pristine):
    with pytest.raises(EngineNotExecutableError, match=f"does not run here: {GONE}. To run it on such a machine, save"):
        built(CALL)
    with pytest.raises(EngineNotExecutableError, match=f"copy {pristine} there and call moeopt.load; moeopt.verify of"):
        moeopt.load(pristine)(CALL)
    assert not hasattr(built, "generate")


def test_the_bundle_says_what_it_holds(pristine):
    manifest = read_manifest(pristine).data
    assert set(manifest["files"]) == {
        *("engine.plan", "layers.json", "model.onnx", "model.onnx.data"),
        *("signature.json", "certificate.json", "golden.safetensors"),
    }
    plan = manifest["tensorrt"]
    assert (plan["product"], plan["sm"], plan["flags"]) == ("tensorrt_rtx", 89, [])
    assert plan["sha256"] == manifest["files"]["engine.plan"]["sha256"]
    assert plan["profiles"] == [{"x": [[1, 1, 16], [3, 8, 16], [12, 32, 16]]}]
    assert [(e["name"], e["dtype"], e["shape"]) for e in plan["inputs"]] == [("x", "FLOAT", [-1, -1, 16])]
    assert [(e["name"], e["dtype"], e["shape"]) for e in plan["outputs"]] == [("output", "FLOAT", [-1, -1, 16])]
    layers = json.loads((pristine / "layers.json").read_text())
    assert len(layers) == sum(plan["layers"].values()) > 3 and plan["activation_bytes"] > 0
    assert any(node.startswith("experts/") for layer in layers for node in layer["nodes"])
    assert manifest["lowerings"] == {"experts": "dense"} and manifest["provider"] == "tensorrt_rtx sm_89"


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


def test_what_could_run_it_and_what_does(pristine):
    found = providers(pristine)
    assert list(found) == ["cuda", "cpu", "nv_tensorrt_rtx", "tensorrt"]
    assert found["cpu"] == "" and found["cuda"].startswith(GONE)
    check = check_bundle(pristine, "cpu", pristine / "certificate.json")
    assert check.failure() == "" and not check.certificate.executed
    certificate = assert_equivalent(build(), moeopt.load(pristine), seeded(2, 5, H, seed=9))
    assert not certificate.executed and certificate.device == DEVICE


def test_verify_of_what_optimize_returned(built):
    certificate = moeopt.verify(built, original=build())
    assert certificate.passed and not certificate.executed and certificate.device == DEVICE


def test_the_onnx_form_can_be_run(pristine):
    engine = moeopt.load(pristine, "cpu")
    x = seeded(1, 11, H, seed=3)
    with torch.no_grad():
        close(engine(x), build()(x))
    assert engine.provider == "cpu" and engine.certificate["executed"] is False


def test_what_is_not_here(pristine):
    with pytest.raises(EngineNotExecutableError, match=f"b: the engine does not run here: {GONE}"):
        moeopt.load(pristine, "cuda")
    for name in ("nv_tensorrt_rtx", "tensorrt", "NvTensorRTRTXExecutionProvider"):
        with pytest.raises(UsageError, match="is not on this machine; it has: cpu; a bundle for TensorRT runs on"):
            moeopt.load(pristine, name)
    with pytest.raises(UsageError, match="provider 'rocm' is unknown"):
        moeopt.verify(pristine, provider="rocm")


def test_copies_and_pickles(built, pristine):
    engine = moeopt.load(pristine)
    for twin in (copy.copy(engine), copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert repr(twin) == f"<moeopt engine {pristine} for tensorrt_rtx sm_89, not on this machine>"
    assert copy.deepcopy(built).model is built.model
    with pytest.raises(UsageError, match="lies in a temporary folder and cannot be pickled: save it with .save"):
        pickle.dumps(built.model)


def test_sixteen_bits_have_a_portable_form(tmp_path):
    done = engine_for("sm_120", dtype="bfloat16", verify="off")
    assert {"fallback.onnx", "fallback.onnx.data"} <= {p.name for p in done.save(tmp_path / "b").iterdir()}
    assert moeopt.verify(tmp_path / "b").end_to_end.passed
    y = moeopt.load(tmp_path / "b", "cpu")(CALL.bfloat16())
    assert y.dtype == torch.bfloat16 and read_manifest(tmp_path / "b").data["tensorrt"]["outputs"][0]["dtype"] == "BF16"


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (
            "sm_75",
            {"dtype": "bfloat16"},
            "Block: sm_75 does not take bfloat16: Turing has no bfloat16; the nearest target that takes it is sm_80",
        ),
        ("sm_99", {}, "target 'sm_99' is not a compute capability that TensorRT builds for"),
        ("sm_100", {}, "TensorRT builds engines for sm_100 on a GPU of that capability only"),
        (None, {}, "this machine has no GPU to take it from: give target=, one of sm_75"),
        ("sm_89", {"tune": True}, "tune=True measures ONNX Runtime's lowerings"),
        ("sm_89", {"session_options": 1}, "session_options are ONNX Runtime's, and the backend is 'tensorrt'"),
        ("sm_89", {"device": "cpu"}, "device='cpu': an engine of TensorRT runs on CUDA; leave device out"),
    ],
)
def test_what_is_refused_before_the_build(target, options, words):
    with pytest.raises(UsageError) as err:
        engine_for(target, **options)
    assert words in str(err.value)


def test_the_package_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UsageError, match="needs TensorRT for RTX, which is not installed: pip install"):
        engine_for()


def test_an_op_that_the_parser_lacks():
    class Counts(Block):
        def forward(self, x):
            return super().forward(x) + torch.nonzero(x[..., 0] > 0).sum()

    with pytest.raises(NotSaveableError, match=r"builds for sm_89: .*\(NonZero\): sm_89 does not take NonZero: it"):
        engine_for(block=Counts)


def test_a_builder_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EngineBuildError, match="tensorrt_rtx, building for sm_89, did not end within 0.05 seconds"):
        engine_for(build_seconds=0.05, verify="off")
    assert not list(tmp_path.glob("**/engine.plan"))


# what the files of others may hold


@pytest.mark.parametrize("name", ["engine.plan", "model.onnx", "layers.json"])
def test_damage_is_found_by_size_or_hash(name, bundle):
    blob = (bundle / name).read_bytes()
    (bundle / name).write_bytes(blob[:-7])
    with pytest.raises(BundleError, match=f"{name}: it has {len(blob) - 7} bytes, and the manifest says {len(blob)}"):
        moeopt.load(bundle)
    (bundle / name).write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name}: its sha256 is not the one in the manifest: it was damaged or"):
        moeopt.verify(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: the file is missing"):
        moeopt.load(bundle, "cpu")


def test_a_swapped_plan_whose_manifest_was_resealed(bundle):
    (bundle / "engine.plan").write_bytes(b"another plan")
    with pytest.raises(BundleError, match="engine.plan is not the one that the manifest describes"):
        moeopt.load(reseal(bundle))


def test_a_graph_with_a_foreign_operator(bundle):
    import onnx

    proto = onnx.load(bundle / "model.onnx", load_external_data=False)
    proto.graph.node[0].domain = "evil"
    (bundle / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(BundleError, match="is evil.*, which moeopt does not write"):
        moeopt.load(reseal(bundle))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=99), "the bundle has schema 99 .*upgrade moeopt"),
        (lambda d: d.pop("tensorrt"), "the manifest does not say what engine.plan runs on"),
        (lambda d: d["tensorrt"].update(product="os"), "the manifest does not say what engine.plan runs on"),
        (lambda d: d["tensorrt"].update(sm="89"), "the manifest does not say what engine.plan runs on"),
        (lambda d: d["tensorrt"].update(cuda="x"), "the manifest does not say what engine.plan runs on"),
        (lambda d: d["tensorrt"].update(profiles=[{"x": [[1]]}]), "the manifest does not say what engine.plan runs on"),
        (lambda d: d["files"].pop("engine.plan"), "engine.plan is not the one that the manifest describes"),
        (lambda d: d["files"].pop("golden.safetensors"), "the bundle has no golden.safetensors"),
        (lambda d: d["files"].pop("model.onnx"), "the bundle has no model.onnx"),
    ],
)
def test_hostile_manifests(change, words, bundle):
    edit(bundle / "moeopt.json", change)
    with pytest.raises(BundleError, match=words):
        moeopt.load(bundle)


def test_a_signature_that_is_none(bundle):
    (bundle / "signature.json").write_text("[]")
    with pytest.raises(BundleError, match="signature.json: it describes no call"):
        moeopt.load(reseal(bundle))


def test_saving_is_one_step(built, tmp_path, monkeypatch):
    target = built.save(tmp_path / "b")
    before = (target / "moeopt.json").read_bytes()
    monkeypatch.setattr(trt_bundle.goldens, "save_golden", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        built.save(target)
    assert (target / "moeopt.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["b"]
    with pytest.raises(UsageError, match="exists and is not a moeopt bundle"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        built.save(tmp_path / "other")


# a machine that runs it


class Plays(Session):
    """ONNX Runtime's CPU in the place of a runner on CUDA."""

    factor = 1.0

    def __init__(self, plan, product, provider, profiles):
        super().__init__(plan.with_name("model.onnx"))
        self.provider, self.profiles, self.product = provider, profiles, product

    def run(self, inputs):
        return [self.factor * y for y in super().run(inputs)]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(trt_engine, "this_machine", lambda name: Machine(89, "1.7.1.116", 13))
    monkeypatch.setattr(trt_engine, "EngineRunner", Plays)
    monkeypatch.setattr(trt_engine, "DEVICE", "cpu")
    monkeypatch.setattr(trt_bundle, "_PASSED", set())


def test_where_it_runs_it_is_executed(pristine, gpu):
    engine = moeopt.load(pristine)
    with torch.no_grad():
        close(engine(CALL), build()(CALL))
    assert engine.provider == "tensorrt_rtx sm_89" and engine.session.profiles == [
        {"x": ((1, 1, 16), (3, 8, 16), (12, 32, 16))}
    ]
    certificate = moeopt.verify(pristine)
    assert certificate.passed and certificate.executed and certificate.device == "tensorrt_rtx sm_89"
    assert moeopt.verify(pristine, original=build(), inputs=CALL).executed
    assert repr(pickle.loads(pickle.dumps(engine))) == f"<moeopt engine {pristine} on tensorrt_rtx sm_89>"
    assert moeopt.verify(pristine, provider="cpu").executed is False


def test_an_engine_that_is_optimised_where_it_runs(gpu, tmp_path):
    done = engine_for(verify="strict")
    assert done.certificate.passed and done.certificate.executed and done.certificate.device == "tensorrt_rtx sm_89"
    assert "equal in 2 other sizes too" in done.certificate.end_to_end.notes
    assert done(CALL).shape == CALL.shape and moeopt.verify(done.save(tmp_path / "b")).executed


def test_a_gpu_that_computes_something_else(pristine, gpu, monkeypatch):
    monkeypatch.setattr(Plays, "factor", 1.01)
    with pytest.raises(NotEquivalentError, match="on tensorrt_rtx sm_89 the engine does not give what it was verified"):
        moeopt.load(pristine)
    assert moeopt.verify(pristine).passed is False
    with pytest.raises(NotEquivalentError, match="the TensorRT engine of Block is not equivalent and was not kept"):
        engine_for()


def test_another_version_on_that_machine(pristine, gpu, monkeypatch):
    monkeypatch.setattr(trt_engine, "this_machine", lambda name: Machine(89, "1.8", 13))
    with pytest.raises(EngineNotExecutableError, match="built by TensorRT for RTX 1.7.1.116, and 1.8 is installed"):
        moeopt.load(pristine, "cuda")
    assert moeopt.verify(pristine).executed is False

"""The command on engines of ONNX Runtime: optimize to a bundle, info, verify; exit codes 0, 1 and 2."""

import json
import shutil
import sys

import pytest

pytest.importorskip("onnxruntime")

import moeopt
from moeopt.cli import main
from tests.backends.onnxrt.toys import E, H, edit_graph

MODEL = """
from tests.backends.onnxrt.toys import call, net

def model():
    return net(), call()

def other():
    return net(seed=1), call()
"""


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


@pytest.fixture
def factory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "engine_models.py"
    path.write_text(MODEL)
    yield path
    sys.modules.pop("engine_models", None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from tests.backends.onnxrt.toys import optimized

    return optimized().save(tmp_path_factory.mktemp("cli") / "b")


def test_optimize_writes_a_bundle(capsys, factory, tmp_path):
    words = "--backend", "onnxruntime", "--verify", "fast", "--quiet", "--json"
    code, out, err = run(capsys, "optimize", f"{factory}:model", *words, "--out", tmp_path / "b")
    assert code == 0, err
    told = json.loads(out)
    assert told["saved"] == str(tmp_path / "b") and told["certificate"]["passed"] is True
    assert told["certificate"]["device"] == "onnxruntime cpu"
    assert run(capsys, "verify", tmp_path / "b", "--quiet")[0] == 0


def test_verify(capsys, bundle, factory):
    code, out, _ = run(capsys, "verify", bundle, "--provider", "cpu", "--quiet")
    assert code == 0 and "moeopt certificate: PASSED" in out and "device onnxruntime cpu" in out
    code, out, _ = run(capsys, "verify", bundle, "--quiet", "--json")
    assert code == 0 and json.loads(out)["passed"] is True and json.loads(out)["device"] == "onnxruntime cpu"
    assert run(capsys, "verify", bundle, "--original", f"{factory}:model", "--quiet")[0] == 0


def test_another_model_is_not_equivalent(capsys, bundle, factory):
    code, out, err = run(capsys, "verify", bundle, "--original", f"{factory}:other", "--quiet")
    assert code == 1 and "FAILED" in out and err == "moeopt: not equivalent\n"


def test_an_absent_provider_is_a_usage_error(capsys, bundle):
    code, out, err = run(capsys, "verify", bundle, "--provider", "cuda", "--quiet")
    assert (code, out) == (2, "") and "provider 'cuda' is not on this machine; it has: cpu" in err
    code, _, err = run(capsys, "verify", bundle, "--provider", "abacus", "--quiet")
    assert code == 2 and "provider 'abacus' is unknown; the providers are cpu, cuda" in err


def test_damage_and_hostility_exit_with_one(capsys, bundle, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "d")
    with (damaged / "model.onnx.data").open("r+b") as file:
        file.truncate(100)
    for words in (("verify", damaged, "--quiet"), ("info", damaged)):
        code, out, err = run(capsys, *words)
        assert (code, out) == (1, "") and "model.onnx.data: it has 100 bytes" in err and err.count("\n") == 1

    def elsewhere(proto):
        tensor = next(t for t in proto.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = "../../etc/passwd"

    hostile = edit_graph(shutil.copytree(bundle, tmp_path / "h"), elsewhere)
    code, _, err = run(capsys, "verify", hostile, "--quiet")
    assert code == 1 and "lies in '../../etc/passwd'; weights lie in model.onnx.data only" in err


def test_info(capsys, bundle):
    code, out, _ = run(capsys, "info", bundle)
    assert code == 0
    for text in (
        "onnxruntime",
        "provider",
        "nodes",
        "x float32 (x_0",
        f", {H})",
        "mask float32 (",
        "layers.0: ",
        "onnx ",
    ):
        assert text in out, out
    code, out, _ = run(capsys, "info", bundle, "--json")
    facts = json.loads(out)
    assert facts["backend"] == "onnxruntime" and facts["provider"] == "cpu" and facts["nodes"] > 20
    assert facts["bytes"] > E * H and facts["takes"] == ["x", "mask"] and facts["golden runs"] >= 2
    sites = moeopt.load(bundle).manifest.data["sites"]
    graph = ", in model.onnx" if "runs" in facts else ""  # another one runs where the kernel is
    assert facts["lowerings"] == [f"{s['name']}: {s['lowering']} ({s['why']}){graph}" for s in sites]
    assert all(f"{name} " in facts["written by"] for name in ("moeopt", "torch", "onnx", "onnxruntime", "onnxscript"))
    assert set(facts["sizes"]) and all(low <= 2 for low, _ in facts["sizes"].values())

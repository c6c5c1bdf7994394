"""The command on TensorRT engines: optimize for a target, info, verify; exit codes 0, 1 and 2."""

import json
import sys

import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'moeopt[tensorrt]'")
pytest.importorskip("onnxscript")

from tests.test_cli_onnx import run

MODEL = """
from tests.toy_moe import build, seeded

def model():
    return build(), seeded(2, 4, 16)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "trt_models.py"
    path.write_text(MODEL)
    yield f"{path}:model"
    sys.modules.pop("trt_models", None)


def test_optimize_info_and_verify(capsys, factory, tmp_path):
    bundle = tmp_path / "b"
    words = ["optimize", factory, "--backend", "tensorrt", "--target", "sm_86", "--verify", "fast", "--out", bundle]
    code, out, err = run(capsys, *words)
    assert code == 0 and "engine: not executed; the verdict is that of a replay" in out, err
    assert "note: engine.plan for sm_86 by tensorrt_rtx" in out and f"saved: {bundle}" in out
    assert "building the engine for sm_86 with tensorrt_rtx" in err

    code, out, _ = run(capsys, "info", bundle)
    plan = json.loads((bundle / "moeopt.json").read_text())["tensorrt"]
    assert code == 0 and f"sha256 {plan['sha256']}" in out and f"layers       {sum(plan['layers'].values())} (" in out
    assert "runs on      sm_86, tensorrt_rtx" in out and "profiles     x 1x1x16, 2x4x16, 8x16x16" in out
    assert "flags        none (no TF32)" in out and "lowerings    experts: dense" in out

    code, out, _ = run(capsys, "verify", bundle)
    assert code == 0 and "engine: not executed" in out and "3 golden runs" in out
    code, _, err = run(capsys, "verify", bundle, "--provider", "cuda")
    assert code == 1 and "the engine does not run here: it needs a GPU of compute capability 8.6" in err
    code, _, err = run(capsys, "verify", bundle, "--provider", "nv_tensorrt_rtx")
    assert code == 2 and "provider 'nv_tensorrt_rtx' is not on this machine" in err
    (bundle / "engine.plan").write_bytes(b"")
    code, _, err = run(capsys, "verify", bundle)
    assert code == 1 and "engine.plan: it has 0 bytes" in err


def test_no_target_is_a_usage_error(capsys, factory):
    code, _, err = run(capsys, "optimize", factory, "--backend", "tensorrt")
    assert code == 2 and "this machine has no GPU to take it from: give target=" in err


def test_this_machine(capsys):
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0 and json.loads(out)["tensorrt-rtx-cu13"].startswith("1.")

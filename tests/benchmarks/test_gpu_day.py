"""``benchmarks/gpu_day.py`` runs on a machine without a GPU too, in tiny sizes, so that it can't rot between GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import timing
from benchmarks.gpu.table import rendered
from benchmarks.gpu_day import CALL, HALVES, LIMITS

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_day.py"


def run(tmp_path, step):
    command = [sys.executable, str(SCRIPT), step, "--device", "cpu", "--out", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.nightly  # twenty seconds of a CPU
def test_the_first_half_writes_its_results(tmp_path):
    pytest.importorskip("transformers")
    done = run(tmp_path, "first")
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "gpu-day.json").read_text())["results"]
    assert {r["step"] for r in results} == {"machine", "facts", "right"}
    assert all(r["ok"] for r in results)
    names = {r["name"] for r in results}
    assert {"versions", "bandwidth", "moeopt separate, 2 tokens, torch.bfloat16", "gradient"} <= names
    text = run(tmp_path, "table").stdout
    assert "### Waits, CUDA graphs and kernels of each path\n\n| path | us | graph us | kernels | waits |" in text
    assert "| moeopt separate, 2 tokens, torch.bfloat16 | " in text and "- bandwidth: bytes_per_s " in text
    assert "| gradient | yes | " in text and "### Failed" not in text


def test_each_half_fits_into_seven_minutes_whatever_its_steps_do():
    assert sorted(HALVES["first"] + HALVES["second"]) == sorted(LIMITS)
    for half in ("first", "second"):
        assert sum(LIMITS[step] for step in HALVES[half]) <= CALL == 7 * 60


@pytest.mark.nightly  # forty seconds of a CPU
def test_a_language_model_is_timed_by_each_way(tmp_path):
    pytest.importorskip("transformers")
    done = run(tmp_path, "model")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert [r["name"].split()[-1] for r in rows] == ["eager", "batched_mm", "grouped_mm", "moeopt"]
    assert all(r["ok"] and r["one token us"] > 0 for r in rows)


def test_a_call_that_waits_is_not_captured(monkeypatch):
    """Such a capture breaks off, and PyTorch's random generator stays in it: later steps could draw no number."""
    monkeypatch.setattr(timing, "waits", lambda device, call: "called a synchronizing CUDA operation")
    monkeypatch.setattr(timing.torch.cuda, "CUDAGraph", lambda: pytest.fail("it was captured"))
    told = timing.in_a_graph("cuda", lambda: pytest.fail("it was called"))
    assert told == "not tried, for it waits: called a synchronizing CUDA operation"


def test_a_file_of_results_is_rendered_as_tables_and_failures_are_named():
    results = [
        {"step": "machine", "name": "versions", "ok": True, "torch": "2.13", "gpu": "NVIDIA H100"},
        {"step": "layer", "name": "qwen", "ok": True, "T": 1, "experts hit": 8, "floor of bytes": 25.1,
         "floor of FLOPs": 0.1, "the model's own loop": 2400.0, "grouped_mm path": "Unfit: a|b",
         "moeopt separate": {"us": 90.0, "graph us": 27.5, "off by": 0.002}},
        {"step": "layer", "name": "the step", "ok": False, "rc": "stopped after 240 s", "s": 240},
        {"step": "model", "name": "transformers eager", "ok": False, "error": "OutOfMemoryError: no"},
        {"step": "runtime", "name": "tests/gpu", "ok": True, "text": "...\n8 passed in 3 s\n"},
    ]  # fmt: skip
    text = rendered(results)
    assert "- versions: torch 2.13, gpu NVIDIA H100" in text
    assert "| block | T | floor | the model's own loop | grouped_mm path | moeopt separate |" in text
    assert "| qwen | 1 | 25.1 | 2400 | Unfit: a\\|b | 90 (27.5) |" in text
    assert "- layer, the step: stopped after 240 s" in text
    assert "- model, transformers eager: OutOfMemoryError: no" in text and "- tests/gpu: 8 passed in 3 s" in text


def test_times_are_held_against_the_floor_and_the_model_s_own_loop(tmp_path):
    done = run(tmp_path, "layer")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(rows) == 2
    for row in rows:
        assert row["floor of bytes"] > 0 and row["the model's own loop"] > 0
        for way in ("moeopt stacked", "moeopt separate", "grouped_mm path", "loop path"):
            assert row[way]["off by"] <= 8 * 2**-8, (way, row[way])  # bfloat16


def test_a_step_that_fails_is_told_and_fails_the_script(tmp_path):
    script = SCRIPT.read_text().replace(
        "getattr(steps, chosen.step)(chosen.device)", "raise SystemExit('no such driver')"
    )
    broken = tmp_path / "benchmarks" / "gpu_day.py"
    broken.parent.mkdir()
    broken.write_text(
        script.replace("Path(__file__).resolve().parents[1]", f"Path({str(SCRIPT.parents[1])!r})").replace(
            'str(ROOT / "benchmarks/gpu_day.py")', repr(str(broken))
        )
    )
    command = [sys.executable, str(broken), "first", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "no such driver" in done.stdout

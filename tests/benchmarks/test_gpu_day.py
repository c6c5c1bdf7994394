"""``benchmarks/gpu_day.py`` runs on a machine without a GPU too, in tiny sizes, so that it can't rot between GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_day.py"


def run(tmp_path, step):
    command = [sys.executable, str(SCRIPT), step, "--device", "cpu", "--out", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_the_first_half_writes_its_results(tmp_path):
    pytest.importorskip("transformers")
    done = run(tmp_path, "first")
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "gpu-day.json").read_text())["results"]
    assert {r["step"] for r in results} == {"machine", "facts", "right"}
    assert all(r["ok"] for r in results)
    names = {r["name"] for r in results}
    assert {"versions", "bandwidth", "moeopt separate, 2 tokens, torch.bfloat16", "gradient"} <= names


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

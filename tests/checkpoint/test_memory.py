"""What a streamed run takes of its own memory does not grow with the model; watched in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 has no experts that are put together", allow_module_level=True)
if not Path("/proc/self/status").exists():
    pytest.skip("this system does not tell what memory is a process's own", allow_module_level=True)

from tests.checkpoint.families import write  # noqa: E402

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, threading, time
import moeopt, torch, transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe
from moeopt.checkpoint.stream import streamed
from moeopt.options import Options

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak = [0]

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

moeopt.optimize(sys.argv[3], verify="off")  # every library is imported and has its buffers
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
limit = int(sys.argv[4])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
made = moeopt.optimize(sys.argv[1], out=sys.argv[2] or None, verify="fast")
time.sleep(0.01)
print(json.dumps({"peak": peak[0] - before, "passed": made.certificate.passed}))
"""
LAYERS = dict(hidden_size=512, moe_intermediate_size=512, num_experts=16, intermediate_size=256)
LAYER = 16 * 3 * 512 * 512 * 4
"""Bytes of one layer's experts."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write("qwen3", tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=1)


def peak(model, out, tiny, limit=0):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(out), str(tiny), str(limit)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["passed"]
    return found["peak"]


def test_streamed_into_a_bundle_a_model_takes_less_than_three_layers(tmp_path, tiny):
    model = write("qwen3", tmp_path / "model", shards=4, num_hidden_layers=4, **LAYERS)
    assert peak(model, tmp_path / "b", tiny) < 3 * LAYER  # two of weights, and what Python and its libraries take

"""A streamed run is killed (SIGKILL) at any point; the same call ends in the bundle of a run that nobody disturbed."""

import json
import os
import sys

import pytest

from tests import children

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 writes other checkpoints of these models", allow_module_level=True)
if not hasattr(os, "fork"):
    pytest.skip("runs are forked, so that libraries are imported once", allow_module_level=True)

from tests.checkpoint.families import write  # noqa: E402

POINTS = (
    "half a line of a weight", "a weight without its line", "half a line of a block", "before the first layer",
    "between two layers", "while the weights file is finished", "before the bundle is in place",
    "after the bundle is in place",
)  # fmt: skip
SAMPLE = (POINTS[0], POINTS[4])
CHILD = """
import json, os, signal, sys, traceback
import torch
torch.set_num_threads(1)
import moeopt, transformers
import transformers.models.qwen3_moe.modeling_qwen3_moe
from moeopt.bundle import manifest
from moeopt.bundle.weights_file import WeightsFile
from moeopt.checkpoint import journal, layer_checks
from moeopt.checkpoint.load import _Slice
from moeopt.pipeline import block

model, backend, folder, points = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])

def die(*given, **fields):
    os.kill(os.getpid(), signal.SIGKILL)

def nth(owner, name, number, instead):
    # the call number `number` of a function is replaced
    real, calls = getattr(owner, name), [0]
    def call(*given, **fields):
        calls[0] += 1
        return instead(*given, **fields) if calls[0] == number else real(*given, **fields)
    setattr(owner, name, call)

def cut(self, line):
    text = json.dumps(line)
    self._journal.write(text[: len(text) // 2])
    self._journal.flush()
    die()

def after(owner, name):
    real = getattr(owner, name)
    setattr(owner, name, lambda *given, **fields: (real(*given, **fields), die()))

def arm(point):
    if point == "half a line of a weight":
        nth(journal.Journal, "_write", 14, cut)
    elif point == "a weight without its line":
        nth(journal.Journal, "_write", 14, die)
    elif point == "half a line of a block":
        real = journal.Journal.note_block
        seen = []
        def note(self, check):
            seen.append(check)
            if len(seen) == 2:
                self._write = lambda line: cut(self, line)
            real(self, check)
        journal.Journal.note_block = note
    elif point == "before the first layer":
        nth(layer_checks, "end_to_end", 1, die)
    elif point == "between two layers":
        nth(layer_checks, "end_to_end", 2, die)
    elif point == "while the weights file is finished":
        real_finish = WeightsFile._finish
        WeightsFile._finish = lambda *given: (nth(os, "fsync", 1, die), real_finish(*given))
    elif point == "before the bundle is in place":
        manifest._move_into_place = die
    elif point == "after the bundle is in place":
        after(manifest, "_move_into_place")

def run(out, point=None):
    # in a process of its own; what it read, verified and compared
    pid = os.fork()
    if pid == 0:
        done = {"read": [], "verified": [], "compared": []}
        get, judge, compare = _Slice.__getitem__, block.verify_block, layer_checks.end_to_end
        _Slice.__getitem__ = lambda self, index: done["read"].append(self._name) or get(self, index)
        block.verify_block = lambda name, *a, **f: done["verified"].append(name) or judge(name, *a, **f)
        layer_checks.end_to_end = lambda *a, **f: done["compared"].append(len(done["compared"])) or compare(*a, **f)
        code = 1
        try:
            if point:
                arm(point)
            made = moeopt.optimize(model, out=out, backend=backend, verify="fast")
            done["passed"] = made.certificate.passed
            done["blocks"] = [c.name for c in made.certificate.blocks]
            with open(out + ".done", "w") as file:
                json.dump(done, file)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert run(folder + "/whole") == 0
for number, point in enumerate(points):
    out = f"{folder}/b{number}"
    print(json.dumps([run(out, point), sorted(os.listdir(folder)), run(out)]), flush=True)
"""


def killed(model, backend, folder, points):
    """For each point: how the killed run ended, what it left, how the same call ended then."""
    folder.mkdir()
    words = [sys.executable, "-c", CHILD, str(model), backend, str(folder), json.dumps(points)]
    done = children.run(words, timeout=300 * (1 + 2 * len(points)))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for point, (first, _, second) in zip(points, lines, strict=True):
        assert first == -9, f"{point}: {done.stderr[-3000:]}"
        assert second == 0, f"{point}: {done.stderr[-3000:]}"
    return lines


def contents(bundle):
    """Each file's bytes; of the two that say how long blocks took, what they say of anything else."""
    found = {file.name: file.read_bytes() for file in bundle.iterdir()}
    found["certificate.json"] = untimed(json.loads(found["certificate.json"]))
    found["moeopt.json"] = untimed(json.loads(found["moeopt.json"]))
    del found["moeopt.json"]["files"]["certificate.json"]
    return found


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(x) for key, x in value.items() if key != "seconds"}
    return [untimed(x) for x in value] if isinstance(value, list) else value


def layers(names):
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write("qwen3", tmp_path_factory.mktemp("kills") / "model", shards=3, num_hidden_layers=3)


@pytest.mark.parametrize("points", [SAMPLE, pytest.param(POINTS, marks=pytest.mark.nightly)], ids=["sample", "all"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(model, tmp_path, points):
    folder = tmp_path / "out"
    killed(model, "torch", folder, points)
    whole, want = json.loads((folder / "whole.done").read_text()), contents(folder / "whole")
    assert len(whole["blocks"]) == 3 and len(whole["compared"]) == 3 and layers(whole["read"]) == {0, 1, 2}
    for number, point in enumerate(points):
        assert contents(folder / f"b{number}") == want, point
        done = json.loads((folder / f"b{number}.done").read_text())
        assert done["passed"] and done["blocks"] == whole["blocks"], point
        at, end = POINTS.index(point), point == POINTS[-1]  # the bundle was whole: the work is begun anew
        assert layers(done["read"]) == ({0, 1, 2} if end else set() if at > 1 else {1, 2}), point
        # the first block of a kind is read anew each time; verdicts on others are kept
        assert layers(done["verified"]) == ({0, 1, 2} if at < 2 or end else {0, 1, 2} if at == 2 else {0}), point
        assert len(done["compared"]) == (3 - max(at - 3, 0) if at < 5 else 3 if end else 0), point
    assert {p.name for p in folder.iterdir()} == {
        x + y for x in ("whole", *(f"b{n}" for n in range(len(points)))) for y in ("", ".done")
    }

"""A run that is killed goes on where it stopped, in a new process, and what it then writes is the same bundle."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.checkpoint.journal import JOURNAL, WEIGHTS, Journal, digest_of_call, folder_of
from moeopt.checkpoint.load import _Slice
from moeopt.checkpoint.stream import streamed
from moeopt.errors import CaptureError, CheckpointError, UsageError
from moeopt.options import Options
from tests import children

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 writes other checkpoints of these models", allow_module_level=True)

from tests.checkpoint.families import write  # noqa: E402

CHILD = """
import os, signal, sys
import moeopt

def say(line):
    if line.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

moeopt.optimize(sys.argv[1], out=sys.argv[2], verify="fast", progress=say)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write("qwen3", tmp_path_factory.mktemp("resume") / "model", shards=3, num_hidden_layers=3)


@pytest.fixture(scope="module")
def stopped(model):
    """What a run that was killed left, by the line of progress at which it was killed."""
    made = {}

    def at(line, out):
        if line not in made:
            first = model.parent / f"killed at {line}"
            done = children.run([sys.executable, "-c", CHILD, str(model), str(first), line])
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert not first.exists() and (folder_of(first) / JOURNAL).is_file()
            made[line] = folder_of(first)
        shutil.copytree(made[line], folder_of(out))

    return at


@pytest.fixture
def read(monkeypatch):
    """The checkpoint's tensors that are read."""
    names, real = set(), _Slice.__getitem__
    monkeypatch.setattr(_Slice, "__getitem__", lambda self, index: names.add(self._name) or real(self, index))
    return names


def opened(model, out, **fields):
    """The model as a run opens it; it is the one that transformers loads. Lines of progress."""
    lines = []
    with streamed(model, Options(verify="fast", progress=lines.append, **fields), out=out) as source:
        want = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
        assert all(torch.equal(value, want[name]) for name, value in source.model.state_dict().items())
        assert all(source.journal.file.mapped.holds(p) for p in source.model.parameters())
    return lines


def layers(names):
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


def test_killed_between_blocks(model, stopped, read, tmp_path, monkeypatch):
    from moeopt.pipeline import block

    stopped("block 3 of 3", tmp_path / "b")
    verified, lines, judge = [], [], block.verify_block
    monkeypatch.setattr(block, "verify_block", lambda name, *a, **f: verified.append(name) or judge(name, *a, **f))
    made = moeopt.optimize(model, out=tmp_path / "b", verify="fast", progress=lines.append)
    assert layers(read) == set()  # every weight was made
    assert layers(verified) == {0, 2}  # the first of its kind is read anew; the second was verified before
    assert [c.name for c in made.certificate.blocks] == [f"model.layers.{n}.mlp.experts" for n in range(3)]
    assert made.certificate.passed and all(c.passed and c.cases for c in made.certificate.blocks)
    assert any(line.endswith(" weights and 2 blocks are done") for line in lines)
    assert not folder_of(tmp_path / "b").exists()
    monkeypatch.undo()
    moeopt.optimize(model, out=tmp_path / "whole", verify="fast")
    graphs = [json.loads((tmp_path / x / "graph.json").read_text()) for x in ("b", "whole")]
    assert graphs[0] == graphs[1]
    weights = [load_file(tmp_path / x / "weights.safetensors") for x in ("b", "whole")]
    for name in {view["block"] for view in graphs[0]["views"].values()}:
        assert torch.equal(weights[0][name], weights[1][name])
    assert moeopt.verify(tmp_path / "b").passed


def test_killed_between_layers_of_weights(model, stopped, read, tmp_path):
    stopped("layer 3 of 3", tmp_path / "b")
    lines = opened(model, tmp_path / "b")
    assert layers(read) == {2}
    assert any(line.startswith("going on: ") and line.endswith(" weights and 0 blocks are done") for line in lines)
    assert [line for line in lines if line.startswith("layer ")] == ["layer 1 of 3: model.layers.2"]


def test_a_weight_that_was_damaged_meanwhile_is_made_again(model, stopped, read, tmp_path):
    stopped("layer 3 of 3", tmp_path / "b")
    entries = [json.loads(line) for line in (folder_of(tmp_path / "b") / JOURNAL).read_text().splitlines()]
    second = next(e for e in entries if e.get("weight", "").startswith("model.layers.1.mlp.experts"))
    with (folder_of(tmp_path / "b") / WEIGHTS).open("r+b") as file:
        file.seek(second["offset"])
        file.write(b"\x55")
    opened(model, tmp_path / "b")
    assert layers(read) == {1, 2}


def test_another_checkpoint_or_other_options_begin_anew(model, stopped, read, tmp_path):
    stopped("layer 3 of 3", tmp_path / "b")
    lines = opened(model, tmp_path / "b", seed=3)
    assert layers(read) == {0, 1, 2} and not any(line.startswith("going on") for line in lines)


def test_verdicts_on_other_example_inputs_are_not_taken(model, tmp_path):
    ids = torch.arange(6).reshape(1, 6)
    for inputs, known in ((ids, False), ({"input_ids": ids}, False), ((ids,), False), ((ids.clone(),), True)):
        lines = []
        with streamed(model, Options(verify="off", progress=lines.append), out=tmp_path / "b", inputs=inputs):
            assert any(line.startswith("going on: ") for line in lines) is known, inputs
    assert len({digest_of_call(x) for x in (None, ids, ids + 1, ids.float(), ids.reshape(2, 3), {"x": ids})}) == 6


def test_a_journal_that_was_cut_off_in_a_line(model, stopped, read, tmp_path):
    stopped("layer 3 of 3", tmp_path / "b")
    journal = folder_of(tmp_path / "b") / JOURNAL
    journal.write_text(journal.read_text()[:-20])
    opened(model, tmp_path / "b")
    assert layers(read) == {1, 2}
    read.clear()
    opened(model, tmp_path / "b")  # what the second run wrote behind the cut is whole
    assert layers(read) == set()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_folder_that_is_half_removed_is_still_known_as_a_runs(tmp_path, monkeypatch, steps):
    """Killed between two files of the folder that it removes: the next run begins anew, and takes it for no other's."""
    out, key = tmp_path / "b", {"what": "this"}

    def one():
        journal = Journal(out, key, 4096, 4096)
        journal.keep("a", torch.ones(3), ["a"])
        return journal

    unlink, left = Path.unlink, [steps]

    def stop(path, *given, **fields):
        if not left[0]:
            raise OSError("killed here")
        left[0] -= 1
        unlink(path, *given, **fields)

    journal = one()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        journal.close(done=True)
    assert (folder_of(out) / JOURNAL).is_file()
    assert (folder_of(out) / WEIGHTS).is_file() == (steps == 0)
    again = Journal(out, key, 4096, 4096)
    assert set(again.weights) == (set() if steps else {"a"})
    again.close(done=True)
    assert not folder_of(out).exists()


def test_whose_the_folder_is_is_on_the_disk_before_a_weight(tmp_path, monkeypatch):
    """After a crash of the machine, too, weights lie beside a journal that says whose they are."""
    settled, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: settled.append(os.readlink(f"/proc/self/fd/{handle}")))
    journal = Journal(tmp_path / "b", {"what": "this"}, 4096, 4096)
    folder = folder_of(tmp_path / "b")
    assert settled[:2] == [str(folder / f"{JOURNAL}.new"), str(folder)]
    journal.keep("a", torch.ones(3), ["a"])
    del settled[:]
    journal.finish()
    assert settled == [str(folder / WEIGHTS), str(folder / JOURNAL)]  # what it says is there comes first
    monkeypatch.setattr(os, "fsync", fsync)
    journal.close(done=True)


def test_two_processes_do_not_write_to_one_place(tmp_path):
    journal = Journal(tmp_path / "b", {}, 4096, 4096)
    with pytest.raises(UsageError, match=r"another process is streaming to .*: wait for it, or give another directory"):
        Journal(tmp_path / "b", {}, 4096, 4096)
    journal.close(done=True)
    assert not folder_of(tmp_path / "b").exists()


def test_a_restored_parameter_that_would_be_converted_again_is_made_anew(model, stopped, read, tmp_path, monkeypatch):
    from moeopt.checkpoint import kept_weights

    stopped("layer 3 of 3", tmp_path / "b")
    monkeypatch.setattr(kept_weights, "_in_place", lambda model, restored: False)
    opened(model, tmp_path / "b")
    assert layers(read) == {0, 1, 2}


def test_a_folder_that_its_owner_removes_while_another_process_locks_it(tmp_path, monkeypatch):
    """The lock of a removed folder holds nothing: a third process would make the folder anew and lock that one."""
    from moeopt import file_lock

    first, real, calls = Journal(tmp_path / "b", {}, 4096, 4096), file_lock.fcntl.flock, []

    def flock(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            first.close(done=True)
        real(descriptor, how)

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    second = Journal(tmp_path / "b", {}, 4096, 4096)
    assert len(calls) == 2 and (folder_of(tmp_path / "b") / WEIGHTS).is_file()
    with pytest.raises(UsageError, match="another process is streaming"):
        Journal(tmp_path / "b", {}, 4096, 4096)
    second.close(done=True)


@pytest.mark.parametrize("begun", [False, True])
def test_work_that_no_later_call_can_go_on_from_is_removed(tmp_path, caplog, begun):
    """The inputs do not fit the model: others are another run, and begin anew."""
    write("qwen3", tmp_path / "model")
    for _ in range(1 + begun):
        caplog.clear()
        with caplog.at_level("WARNING", "moeopt"), pytest.raises(CaptureError, match="the model knows the ids 0 to 95"):
            moeopt.optimize(tmp_path / "model", torch.tensor([[1, 96]]), out=tmp_path / "b", verify="off")
        assert not folder_of(tmp_path / "b").exists()
        removed = "is removed: what was done there belongs to files, options and inputs that end in this error, and a"
        assert f"{folder_of(tmp_path / 'b')} {removed} call with others begins anew" in caplog.text
        assert "goes on from there" not in caplog.text


def test_files_that_lack_a_weight_begin_nothing(tmp_path, caplog):
    write("qwen3", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "norm" in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, file, metadata={"format": "pt"})
    with caplog.at_level("WARNING", "moeopt"), pytest.raises(CheckpointError, match=f"no values for {gone}"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b", verify="off")
    assert not folder_of(tmp_path / "b").exists() and not caplog.text


def test_work_that_was_interrupted_is_kept_when_a_file_beside_the_weights_is_damaged_meanwhile(tmp_path, caplog, read):
    write("qwen3", tmp_path / "model", num_hidden_layers=3)

    def interrupt(line):
        if line.startswith("layer 3 of 3"):
            raise KeyboardInterrupt

    with caplog.at_level("WARNING", "moeopt"), pytest.raises(KeyboardInterrupt):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b", verify="fast", progress=interrupt)
    kept = "keeps what is done: the same call goes on from there; delete it to give the work up"
    assert f"{folder_of(tmp_path / 'b')} {kept}" in caplog.text
    generation = tmp_path / "model" / "generation_config.json"
    good = generation.read_text()
    generation.write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config.json is damaged"):
        moeopt.optimize(tmp_path / "model", out=tmp_path / "b", verify="fast")
    generation.write_text(good)
    read.clear()
    lines = opened(tmp_path / "model", tmp_path / "b")
    assert layers(read) == {2} and any(line.startswith("going on: ") for line in lines)

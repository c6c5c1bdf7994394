"""A checkpoint directory on ranks: none of them holds the whole model in memory, and one of them does the work."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moeopt
from moeopt.errors import CheckpointError, RankLostError, UsageError
from tests.distributed.ranks import Lost, collected, run_ranks, started

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("transformers 4 writes other checkpoints of these models", allow_module_level=True)

from tests.checkpoint.families import write  # noqa: E402

SMALL = dict(num_hidden_layers=3)
LARGE = dict(hidden_size=512, moe_intermediate_size=1024, num_experts=16, intermediate_size=256, num_hidden_layers=6)
LAYER = 16 * 3 * 512 * 1024 * 2
"""Bytes of one large layer's experts."""


def mesh_of(size):
    return init_device_mesh("cpu", (size,))


def ids_of(rank, tokens):
    return torch.randint(0, 96, (1, tokens), generator=torch.Generator().manual_seed(rank))


def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def counted(names, where):
    """What is verified and read from now on, as names."""
    from moeopt.checkpoint.load import _Slice
    from moeopt.pipeline import block

    judge, get = block.verify_block, _Slice.__getitem__
    block.verify_block = lambda name, *a, **f: names.append(name) or judge(name, *a, **f)
    _Slice.__getitem__ = lambda self, index: where.append(self._name) or get(self, index)


def from_directory(rank, size, folder, workspace, fields):
    verified, read = [], []
    counted(verified, read)
    made = moeopt.distribute(folder, mesh_of(size), workspace=workspace, verify="fast", **fields)
    ids = ids_of(rank, 3 + 4 * rank)
    with torch.no_grad():
        y = made(input_ids=ids, use_cache=False).logits
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in made.model.parameters())
    return {
        "y": y, "verified": verified, "read": read, "held": held, "passed": made.certificate.passed,
        "notes": made.certificate.notes, "blocks": [c.name for c in made.certificate.blocks],
    }  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"exact": False}], ids=["rows", "ranks"])
def test_one_rank_works_and_the_others_take_what_it_wrote(tmp_path, fields):
    folder, workspace = write("qwen3", tmp_path / "model", shards=2, **SMALL), tmp_path / "work"
    first = run_ranks(from_directory, 2, str(folder), str(workspace), fields)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    whole = sum(p.numel() for p in model.parameters())
    for rank, found in enumerate(first):
        with torch.no_grad():
            want = model(input_ids=ids_of(rank, 3 + 4 * rank), use_cache=False).logits
        assert torch.allclose(found["y"], want, atol=1e-5, rtol=1e-5)
        assert found["passed"] and found["blocks"] == [f"model.layers.{n}.mlp.experts" for n in range(3)]
        assert found["held"] < whole
        assert any(note.startswith("streamed: each block and each layer verified") for note in found["notes"])
    worked, took = sorted(first, key=lambda found: -len(found["read"]))
    assert len(set(worked["verified"])) == 3 and not took["read"]
    assert set(took["verified"]) == {"model.layers.0.mlp.experts"}  # the first of its kind is read on each rank

    again = run_ranks(from_directory, 2, str(folder), str(workspace), fields)
    assert all(not found["read"] and len(found["verified"]) == 1 for found in again)
    assert all(torch.equal(a["y"], b["y"]) for a, b in zip(first, again, strict=True))
    assert {file.name for file in workspace.iterdir()} == {"weights.safetensors", "journal.jsonl"}


def peak_of(rank, size, folder, workspace, tiny):
    moeopt.distribute(tiny, mesh_of(size), workspace=f"{workspace}-tiny", verify="off")  # libraries have their buffers
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    made = moeopt.distribute(folder, mesh_of(size), workspace=workspace, verify="off")
    with torch.no_grad():
        made(input_ids=ids_of(rank, 4), use_cache=False)
    done.set()
    thread.join()
    return peak[0] - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no figures of a process's own memory")
def test_a_rank_takes_no_more_memory_than_its_experts_and_two_layers(tmp_path):
    """Loading the whole model on each rank took all six layers and more."""
    folder = write("qwen3", tmp_path / "model", shards=4, dtype=torch.bfloat16, **LARGE)
    tiny = write("qwen3", tmp_path / "tiny", num_hidden_layers=1)
    for peak in run_ranks(peak_of, 2, str(folder), str(tmp_path / "work"), str(tiny), deadline=900.0):
        assert peak < 6 * LAYER / 2 + 2 * LAYER, f"{peak / LAYER:.2f} layers"


def without_workspace(rank, size, apart, stacked):
    mesh = mesh_of(size)
    with pytest.raises(UsageError) as told:
        moeopt.distribute(apart, mesh, verify="off")
    dist.barrier()
    made = moeopt.distribute(stacked, mesh, verify="fast")
    return str(told.value), made.certificate.passed


def test_files_that_have_the_experts_as_the_model_does_need_no_workspace(tmp_path):
    apart, stacked = write("qwen3", tmp_path / "apart"), write("gpt_oss", tmp_path / "stacked")
    for message, passed in run_ranks(without_workspace, 2, str(apart), str(stacked)):
        assert passed
        assert "weights in another form than the model (experts that are apart in the files" in message
        assert re.search(r"workspace=, a folder with [\d.]+ [kM]B free that the ranks of this machine share", message)


def one_is_lost(rank, size, folder, workspace, how):
    from moeopt.checkpoint.journal import Journal

    if how == "other folder" and rank == 1:
        folder += "-absent"
    if how == "killed":
        real = Journal.keep

        def keep(self, *given):
            if len(self.weights) == 8 and not Path(workspace, "killed").exists():  # whichever rank it is that works
                Path(workspace, "killed").write_text(str(rank))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *given)

        Journal.keep = keep
    try:
        moeopt.distribute(folder, mesh_of(size), workspace=workspace, verify="off", timeout=12)
    except (RankLostError, UsageError, CheckpointError) as err:
        return type(err).__name__, str(err)
    return "nothing", ""


def test_a_rank_that_fails_to_read_is_told_by_name(tmp_path):
    folder = write("qwen3", tmp_path / "model", **SMALL)
    (kind, message), (own, why) = run_ranks(one_is_lost, 2, str(folder), str(tmp_path / "work"), "other folder")
    assert own == "UsageError" and "is no directory" in why
    assert kind == "RankLostError"
    assert "rank 1 raised UsageError" in message and "the whole model, reading the checkpoint" in message


def test_a_rank_that_is_killed_while_it_works_and_the_next_start(tmp_path):
    folder, workspace = write("qwen3", tmp_path / "model", **SMALL), tmp_path / "work"
    with started(one_is_lost, 2, str(folder), str(workspace), "killed") as (ranks, results):
        found = collected(ranks, results)
    dead = int((workspace / "killed").read_text())
    (workspace / "killed").unlink()
    assert isinstance(found[dead], Lost) and found[dead].exitcode == -signal.SIGKILL
    kind, message = found[1 - dead]
    assert kind == "RankLostError" and f"rank {dead} exited or stopped" in message
    lines = [json.loads(line) for line in (workspace / "journal.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "weight" in line]) >= 8
    assert all(found["passed"] for found in run_ranks(from_directory, 2, str(folder), str(workspace), {}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"workspace": "w"}, "^workspace= is for a directory, and this model is optimised already: give it to moeopt"),
        ({"verify": "off"}, "^verify= is for a directory"),
        ({"task": "text-generation"}, "^task= is for a directory"),
    ],
)
def test_what_is_for_a_directory_is_refused_with_a_model(alone, fields, words):
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match=words):
        moeopt.distribute(moeopt.optimize(layer, torch.ones(1, 2), verify="off"), alone, **fields)


def test_a_workspace_that_is_a_file(alone, tmp_path):
    (tmp_path / "w").write_text("")
    with pytest.raises(UsageError, match="is a file: give a folder, which is made where there is none"):
        moeopt.distribute(write("qwen3", tmp_path / "model"), alone, workspace=tmp_path / "w")


def test_a_workspace_that_holds_something_else_is_left_as_it_is(alone, tmp_path):
    """Files in it are written over and removed, so it must not be a model's or a user's own folder."""
    model = write("qwen3", tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(UsageError, match="which is none of moeopt's files there: give a folder of its own"):
        moeopt.distribute(model, alone, workspace=tmp_path / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before

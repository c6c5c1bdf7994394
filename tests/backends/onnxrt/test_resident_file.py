"""An engine of ONNX Runtime whose weights stay on disk: the same results, and the kernel confirms what is in memory."""

import mmap
import os
from pathlib import Path

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.backend import OnnxRuntimeBackend
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.bundle import resident_file
from moeopt.bundle.resident_file import CHUNK, ResidentFile
from moeopt.errors import UsageError
from tests.bundle.test_resident import EXPERT, Layers, rows

if not hasattr(os, "posix_fadvise") or not Path("/proc/self/pagemap").exists():
    pytest.skip("this system is not asked which pages are mapped", allow_module_level=True)

BUDGET = 6 * EXPERT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    made = moeopt.optimize(Layers().eval(), rows(0, 16), backend="onnxruntime", verify="off")
    return made.save(tmp_path_factory.mktemp("resident") / "b")


def test_the_results_are_the_same_and_the_budget_holds(bundle):
    calls = [rows(n, 8 if n == 0 else 1) for n in range(6)]
    plain = moeopt.load(bundle, mapped=True)
    want = [plain(x) for x in calls]
    assert plain.residency is None
    del plain
    engine = moeopt.load(bundle, resident=BUDGET)
    pages = engine._resident
    assert pages.measured() == 0  # what the self-test and the golden runs read has left
    for x, expected in zip(calls, want, strict=True):
        assert torch.equal(engine(x), expected)
        assert 0 < pages.measured() <= pages.residency.resident <= BUDGET
    found = engine.residency
    assert found.over > EXPERT and 0 < found.hit_rate < 1  # eight tokens chose more, and some of it stayed
    assert f"{found.resident / 1e6:.2f} MB of {BUDGET / 1e6:.2f} MB of weights in memory" in str(found)
    assert "read a call" in str(found) and "above that for what one call uses" in str(found)
    assert "MADV_DONTNEED" in found.enforced and "not held" not in found.enforced
    for _ in range(3):  # what each call uses comes to stay, and is read no more
        engine(calls[1])
    kept = engine.residency.bytes_read
    engine(calls[1])
    assert engine.residency.bytes_read == kept >= found.bytes_read > 0


def test_pages_that_the_process_has_written_to_stay(tmp_path):
    """They are its own: dropped, they would come back with what the file has."""
    file = tmp_path / "w"
    file.write_bytes(bytes(4 * CHUNK))
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory[CHUNK] = 7
    with file.open("rb") as opened:
        again = mmap.mmap(opened.fileno(), CHUNK, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    pages = ResidentFile(CHUNK, file)
    assert memory[CHUNK] == 7 and memory[2 * CHUNK] == 0
    pages.after()
    assert memory[CHUNK] == 7 and pages.residency.resident == CHUNK
    assert sum(memory[:]) == 7 and sum(again[:]) == 0  # all of it is read
    assert pages.measured() == 4 * CHUNK  # what is mapped twice is there once


def test_weights_that_are_not_mapped_are_refused(bundle, tmp_path, monkeypatch):
    (tmp_path / "w").write_bytes(b"none")
    with pytest.raises(UsageError, match=r"and none of these lie there: the session made copies of them; leave it out"):
        ResidentFile(1 << 20, tmp_path / "w")
    engine = moeopt.load(bundle)
    engine.graph = "absent.onnx"
    with pytest.raises(UsageError, match=r"of a file of their own, and absent.onnx holds them itself: leave it out"):
        engine.keep_resident(1 << 20)
    monkeypatch.setattr(OnnxRuntimeBackend, "_open_impl", lambda *given: OfflineEngine(tmp_path, {}, "cuda"))
    with pytest.raises(UsageError, match="resident= is for engines on the CPU, and .* runs on cuda: leave it out"):
        moeopt.load(bundle, resident="1MB")
    monkeypatch.setattr(resident_file, "_PAGEMAP", tmp_path / "absent")
    with pytest.raises(UsageError, match="which this system is not asked for here: use Linux"):
        ResidentFile(1 << 20, tmp_path / "w")

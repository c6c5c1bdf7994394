"""An engine of ONNX Runtime whose weights stay on disk: the same results, and the kernel confirms what is in memory."""

import mmap
import os
import time
from pathlib import Path

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt import bundle as onnx_bundle
from moeopt.bundle import resident_file
from moeopt.bundle.resident_file import WINDOW, ResidentFile
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


def settled(pages):
    """Bytes in memory when what was being read ahead while they were dropped has left, too."""
    for _ in range(100):
        pages._drop()
        if pages.measured() <= pages.residency.resident:
            break
        time.sleep(0.05)
    return pages.measured()


def test_the_results_are_the_same_and_the_budget_holds(bundle):
    calls = [rows(n, 8 if n == 0 else 1) for n in range(6)]
    plain = moeopt.load(bundle, mapped=True)
    want = [plain(x) for x in calls]
    assert plain.residency is None
    del plain
    engine = moeopt.load(bundle, resident=BUDGET)
    pages = engine._resident
    assert settled(pages) == 0  # what the self-test and the golden runs read has left
    for x, expected in zip(calls, want, strict=True):
        assert torch.equal(engine(x), expected)
        assert 0 < settled(pages) <= pages.residency.resident <= BUDGET
    found = engine.residency
    assert found.over > EXPERT and 0 < found.hit_rate < 1  # eight tokens chose more, and some of it stayed
    assert f"{found.resident / 1e6:.2f} MB of {BUDGET / 1e6:.2f} MB of weights in memory" in str(found)
    assert "read a call" in str(found) and "above that for what one call uses" in str(found)
    assert "MADV_DONTNEED" in found.enforced and "not held" not in found.enforced
    for _ in range(3):  # what each call uses comes to stay, and is read no more
        engine(calls[1])
    kept = engine.residency.bytes_read
    engine(calls[1])
    assert kept <= engine.residency.bytes_read < kept + EXPERT and kept >= found.bytes_read > 0


def test_what_the_cache_has_around_a_page_that_was_used_does_not_count(tmp_path):
    """A fault maps of it what lies in the page's own window of addresses, wherever in the file that begins."""
    file, used = tmp_path / "w", 2 * WINDOW + WINDOW // 2
    file.write_bytes(os.urandom(5 * WINDOW))
    with file.open("rb") as opened:
        one, other = (mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) for _ in range(2))
        pages = ResidentFile(5 * WINDOW, file)
        for memory, read in ((one, WINDOW), (one, WINDOW), (other, 2 * WINDOW)):
            assert os.pread(opened.fileno(), 5 * WINDOW, 0)[used] == memory[used]
            pages.after()
            assert pages.residency.bytes_read == pages.residency.resident == read
    assert settled(pages) <= 2 * WINDOW and pages.residency.hit_rate == 1 / 3


def test_pages_that_the_process_has_written_to_stay(tmp_path):
    """They are its own: dropped, they would come back with what the file has."""
    file = tmp_path / "w"
    file.write_bytes(bytes(4 * WINDOW))
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory[WINDOW] = 7
    with file.open("rb") as opened:
        again = mmap.mmap(opened.fileno(), WINDOW, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    pages = ResidentFile(WINDOW, file)
    assert memory[WINDOW] == 7 and memory[2 * WINDOW] == 0
    pages.after()
    assert memory[WINDOW] == 7 and pages.residency.resident == WINDOW
    assert sum(memory[:]) == 7 and sum(again[:]) == 0  # all of it is read
    assert pages.measured() == 4 * WINDOW  # what is mapped twice is there once


def test_a_budget_is_refused_before_a_graph_is_read(bundle, monkeypatch):
    monkeypatch.setattr(onnx_bundle, "_checked", lambda *given: pytest.fail("the graph was read"))
    monkeypatch.setattr(onnx_bundle, "_provider", lambda *given: "cuda")
    with pytest.raises(UsageError, match="resident= is for engines on the CPU, and .* runs on cuda: leave it out"):
        moeopt.load(bundle, resident="1MB")


def test_weights_that_are_not_mapped_are_refused(bundle, tmp_path, monkeypatch):
    (tmp_path / "w").write_bytes(b"none")
    with pytest.raises(UsageError, match=r"and none of these lie there: the session made copies of them; leave it out"):
        ResidentFile(1 << 20, tmp_path / "w")
    engine = moeopt.load(bundle)
    engine.graph = "absent.onnx"
    with pytest.raises(UsageError, match=r"of a file of their own, and absent.onnx holds them itself: leave it out"):
        engine.keep_resident(1 << 20)
    monkeypatch.setattr(resident_file, "PAGEMAP", tmp_path / "absent")
    with pytest.raises(UsageError, match="which this system is not asked for here: use Linux"):
        ResidentFile(1 << 20, tmp_path / "w")

"""Experts on disk: the results are those of an engine in memory, and the kernel confirms what is in memory."""

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import moeopt
from moeopt.backends.torch import bundle as torch_bundle
from moeopt.bundle import resident
from moeopt.bundle.expert_tensors import tensors_by_expert
from moeopt.bundle.mapped_file import MappedFile
from moeopt.bundle.resident import ResidentExperts
from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.limits import as_bytes
from tests import children

if not hasattr(os, "posix_fadvise") or not Path("/proc/self/maps").exists():
    pytest.skip("this system is not asked to drop pages of files", allow_module_level=True)

E, H, I = 16, 128, 256  # noqa: E741  an expert has 384 kB, its pages are its own
EXPERT = 3 * H * I * 4


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(H, E, bias=False)
        self.w_in = torch.nn.Parameter(torch.randn(E, 2 * I, H) * 0.05)
        self.w_out = torch.nn.Parameter(torch.randn(E, H, I) * 0.05)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if token.numel():
                gate, up = (x[token] @ self.w_in[e].t()).chunk(2, -1)
                y = (torch.nn.functional.silu(gate) * up) @ self.w_out[e].t()
                out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def layer(*matrices):
    """One layer, as a list of layers: by expert its part of each stack."""
    return [[list(parts) for parts in zip(*matrices, strict=True)]]


def mapped(tmp_path, *shapes):
    """A file of zeros, and one layer of float32 matrices that are its pages."""
    file, sizes = tmp_path / "w", [4 * math.prod(shape) for shape in shapes]
    file.write_bytes(bytes(sum(sizes)))
    pages = MappedFile(file)
    return file, layer(*(pages.tensor(torch.float32, s, sum(sizes[:n])) for n, s in enumerate(shapes)))


def rows(number, count):
    return torch.randn(count, H, generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    made = moeopt.optimize(Layers().eval(), rows(0, 16), verify="fast")
    assert len(made.report.rewritten) == 2
    return made.save(tmp_path_factory.mktemp("resident") / "b")


CHILD = """
import gc, json, sys, torch
import moeopt
from tests.bundle.test_resident import rows

calls = [rows(n, 8 if n == 0 else 1) for n in range(12)]
engine = moeopt.load(sys.argv[1])
want = [engine(x) for x in calls]
del engine
gc.collect()
engine = moeopt.load(sys.argv[1], resident=int(sys.argv[2]))
import resource
limit = int(sys.argv[3])
used = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
measured = [engine._resident.measured()]
for x, expected in zip(calls, want):
    assert torch.equal(engine(x), expected)
    measured.append(engine._resident.measured())
found = engine.residency
print(json.dumps({"measured": measured, "said": str(found), "hit": found.hit_rate, "calls": found.calls,
                  "tokens": found.tokens, "read": found.bytes_read, "over": found.over, "resident": found.resident}))
"""


def test_with_half_of_the_experts_in_memory_the_results_are_the_same_bits(bundle):
    """In a process of its own: RLIMIT_DATA bounds its anonymous memory, mincore tells which pages are in memory."""
    half = E * EXPERT  # of two layers
    done = children.run([sys.executable, "-c", CHILD, str(bundle), str(half), str(200_000_000)])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    edges = 2 * E * 3 * 4096  # a page that two experts share stays
    assert found["measured"][0] <= edges
    assert max(found["measured"]) <= half + edges and max(found["measured"]) > half // 2
    assert (found["calls"], found["tokens"], found["over"]) == (12, 8 + 11, 0)
    assert 0 < found["hit"] < 1 and found["read"] >= found["resident"] > 0
    assert "MADV_DONTNEED, POSIX_FADV_DONTNEED" in found["said"] and "MB read a token" in found["said"]


def test_the_experts_that_tokens_choose_most_stay(tmp_path):
    file, layers = mapped(tmp_path, (4, 32, 32))
    experts = ResidentExperts(2 * 4096, file, layers)
    for ids in ([[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]], [[0, 3]]):
        experts.before(0, torch.tensor(ids))
    assert [id(e) in experts._here for e in experts._layers[0]] == [True, False, False, True]
    assert experts.residency.hit_rate == 6 / 10 and experts.residency.bytes_read == 4 * 4096


def test_ids_that_name_no_expert_read_nothing(tmp_path):
    file, layers = mapped(tmp_path, (2, 32, 32), (2, 32, 32))
    experts = ResidentExperts(3 * 4096, file, layers)
    experts.before(0, torch.tensor([[-1, 2], [7, -5]]))
    assert experts.residency.bytes_read == 0 and experts.residency.tokens == 2
    experts.before(0, torch.tensor([[1, -1]]))
    assert experts.residency.bytes_read == 2 * 4096


def test_a_choice_that_exceeds_the_budget_runs_and_is_told(tmp_path):
    file, layers = mapped(tmp_path, (4, 32, 32))
    experts = ResidentExperts(4096, file, layers)
    experts.before(0, torch.tensor([[0, 1], [2, 3]]))
    assert experts.residency.over == 3 * 4096 and experts.residency.resident == 4 * 4096
    assert "16.4 kB of 4.1 kB of experts in memory" in str(experts.residency)
    assert ", at most 12.3 kB above that for one layer's own choice; pages" in str(experts.residency)
    experts.before(0, torch.tensor([[3]]))  # which misses nothing, and has nothing of the others
    assert experts.residency.resident == 4096 and experts.residency.over == 3 * 4096


def test_experts_that_two_layers_share_are_held_once(tmp_path):
    file, layers = mapped(tmp_path, (2, 32, 32))
    experts = ResidentExperts(4096, file, layers * 2)
    experts.before(0, torch.tensor([[1]]))
    experts.before(1, torch.tensor([[1]]))
    found = experts.residency
    assert (found.resident, found.bytes_read, found.hit_rate, found.tokens) == (4096, 4096, 0.5, 1)


class Asked:
    """What would be asked of the C library."""

    def __init__(self):
        self.calls = []

    def madvise(self, address, size, advice):
        self.calls.append(advice)

    def mincore(self, address, size, pages):
        torch.frombuffer((ctypes.c_ubyte * -(-size.value // 4096)).from_address(pages.value), dtype=torch.uint8).fill_(
            1
        )


def test_the_disk_has_work_while_the_next_expert_leaves(tmp_path):
    file, layers = mapped(tmp_path, (4, 96, 32))
    experts = ResidentExperts(2 * 3 * 4096, file, layers)  # of one whole page at least
    experts.before(0, torch.tensor([[0, 1]]))
    experts._libc = asked = Asked()
    experts.before(0, torch.tensor([[2, 3]]))
    will_need, do_not_need, populate = 3, 4, 22
    assert asked.calls == [do_not_need, will_need, do_not_need, will_need, populate, populate]


def test_what_cannot_be_dropped_is_told(tmp_path, monkeypatch, caplog):
    """As where the file lies on a file system in memory: mincore finds every page, whatever was dropped."""
    monkeypatch.setattr(resident.ctypes, "CDLL", lambda *_, **__: Asked())
    file, layers = mapped(tmp_path, (4, 128, 32))
    words = str(ResidentExperts(4 * 4096, file, layers, others=2).residency)
    assert (
        "; not held to that: the experts of 2 more layers, whose weights the graph does not read as they lie; " in words
    )
    assert re.search(
        r"; [0-9.]+ kB that stay in memory whatever is dropped: .*w lies in memory itself \(tmpfs\), or an", words
    )
    assert "resident=16.4 kB; not held to that" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may act for another user")
def test_who_may_not_write_to_the_file_drops_its_pages_too(tmp_path):
    """MADV_PAGEOUT does nothing for such a process, and its pages stay where they are mapped."""
    size = 1 << 20
    file = tmp_path / "w"
    file.write_bytes(os.urandom(4 * size))
    file.chmod(0o644)
    fits = MappedFile(file)  # of the owner, which mincore tells the truth
    whole = layer(fits.tensor(torch.uint8, (4, 1024, 1024), 0))
    experts = ResidentExperts(size, file, whole)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            for e in (0, 1, 2, 3):
                experts.before(0, torch.tensor([[e]]))
            os.kill(os.getpid(), signal.SIGSTOP)  # while it is looked at
        finally:
            os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        held = experts.measured()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert held <= size


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_experts_that_are_codes(tmp_path, quantize):
    torch.manual_seed(0)
    made = moeopt.optimize(Layers().eval(), rows(0, 16), verify="off", quantize=quantize)
    calls, folder = [rows(n % 8, 1) for n in range(16)], made.save(tmp_path / "b")
    engine, whole = moeopt.load(folder, resident="1MB"), moeopt.load(folder)
    assert all(torch.equal(engine(x), whole(x)) for x in calls)
    found = engine.residency
    codes = 3 * H * I // (1 if quantize == "int8" else 2)
    each = found.bytes_read / sum(len(x) for x in calls) / 4 / (1 - found.hit_rate)
    assert codes < each < 1.3 * codes and found.resident <= 10**6 and 0 < found.hit_rate < 1


def test_numbers_that_lie_apart_are_left_alone():
    """Of experts along another axis, the pages between an expert's first number and its last are the others' too."""
    spec, w_in, w_out = ExpertsSpec().text, torch.ones(2, 8, 4), torch.ones(2, 4, 4)
    op = torch.ops.moeopt.experts.default
    assert len(tensors_by_expert(op, ([w_in], [w_out], None, None, None, spec))) == 2
    turned = w_in.transpose(1, 2).contiguous().transpose(1, 2)
    assert len(tensors_by_expert(op, ([turned], [w_out], None, None, None, spec))) == 2
    apart = w_in.movedim(0, 1).contiguous().movedim(1, 0)
    assert tensors_by_expert(op, ([apart], [w_out], None, None, None, spec)) is None
    assert tensors_by_expert(op, ([], [], None, None, None, spec)) is None


def rewritten_with_room(bundle, folder, room):
    """The bundle, ``room`` bytes of whose weights' header were added: a safetensors file like any other."""
    shutil.copytree(bundle, folder)
    file, manifest = folder / "weights.safetensors", folder / "moeopt.json"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    file.write_bytes((size + room).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * room + raw[8 + size :])
    said = json.loads(manifest.read_text())
    said["files"][file.name] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    manifest.write_text(json.dumps(said))
    return folder


def test_weights_that_were_copied_when_they_were_read_are_never_dropped(bundle, tmp_path):
    """What MADV_DONTNEED takes of memory that is no file's comes back as zeros."""
    folder = rewritten_with_room(bundle, tmp_path / "b", 8)
    engine, want = moeopt.load(folder), moeopt.load(bundle)(rows(1, 4))
    with pytest.raises(UsageError, match=r"in the pages of .*weights.safetensors, and none of these lie there: they w"):
        engine.keep_resident(6 * EXPERT)
    assert torch.equal(engine(rows(1, 4)), want)


def test_a_matrix_that_was_copied_beside_one_in_the_file_stays_and_is_told(tmp_path, caplog):
    file, [pages] = mapped(tmp_path, (4, 32, 32))
    copies = torch.ones(4, 64, 64)
    experts = ResidentExperts(4096, file, [[[*held, copy] for held, copy in zip(pages, copies, strict=True)]])
    for e in range(4):
        experts.before(0, torch.tensor([[e]]))
    assert bool((copies == 1).all()) and experts.residency.bytes_read == 4 * 4096
    assert "; not held to that: 65.5 kB that were copied when they were read, as they lie in the file" in caplog.text


def test_threads_share_one_budget(bundle):
    from concurrent.futures import ThreadPoolExecutor

    engine, budget = moeopt.load(bundle, resident=6 * EXPERT), 6 * EXPERT
    calls = [rows(n, 1) for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(engine, calls))
    want = moeopt.load(bundle)
    assert all(torch.equal(y, want(x)) for x, y in zip(calls, got, strict=True))
    found = engine.residency
    assert found.tokens == 24 and found.resident <= budget and found.over == 0


def test_a_budget_below_one_expert_is_refused(bundle):
    with pytest.raises(UsageError, match=rf"resident=1000 is less than the {EXPERT} bytes of one expert: give that"):
        moeopt.load(bundle, resident=1000)


def test_a_gpu_is_refused_before_weights_are_read(bundle, monkeypatch):
    monkeypatch.setattr(torch_bundle, "_target_device", lambda *given: torch.device("cuda"))
    monkeypatch.setattr(torch_bundle, "_opened", lambda *given: pytest.fail("the weights were read"))
    with pytest.raises(UsageError, match="resident= is for engines on the CPU, and .* runs on cuda: leave it out"):
        moeopt.load(bundle, resident="1GB")


def test_a_bundle_without_experts_is_refused(tmp_path):
    moeopt.optimize(torch.nn.Linear(4, 4), torch.ones(2, 4), verify="off").save(tmp_path / "b")
    with pytest.raises(UsageError, match="has none that its graph reads as they are in the file: leave it out"):
        moeopt.load(tmp_path / "b", resident="1GB")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("512 MiB", 512 << 20), (4096, 4096), ("1.5kb", 1500), ("2e", None), ("", None), (-1, None),
     (True, None), ("0", None), ("many", None)],
)  # fmt: skip
def test_sizes(text, size):
    if size is None:
        with pytest.raises(UsageError, match=r"resident=.* is no size: give one like '8GB', '512MB', or a number of"):
            as_bytes("resident", text)
    else:
        assert as_bytes("resident", text) == size


def test_weights_of_a_loaded_bundle_are_pages_of_its_file(bundle):
    engine = moeopt.load(bundle, mapped=True)
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "weights.safe" in line]
    spans = [tuple(int(part, 16) for part in span.split("-")) for span in mapped]
    large = [w for w in engine._runner.weights.values() if w.numel() > 1000]
    assert large and all(any(a <= w.data_ptr() < b for a, b in spans) for w in large)
    assert engine.residency is None

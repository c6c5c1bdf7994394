"""Decoding with a part of the experts in memory: moeopt's ``resident=`` beside plain mmap and accelerate's offload.

    python benchmarks/streaming.py --gigabytes 2 --folder /var/tmp/streaming --only streamed    writes both
    python benchmarks/resident.py --gigabytes 2 --folder /var/tmp/streaming --share 0.5

moeopt       the bundle with ``resident=``: experts beyond the budget are unmapped and dropped from the file's cache
plain mmap   the same bundle with ``mapped=True``: the kernel's own read-ahead brings pages. What exceeds the budget is
             dropped between tokens (MADV_DONTNEED, POSIX_FADV_DONTNEED), pages that were used longest ago first, as the
             kernel under a limit would; a token may exceed it meanwhile, which favours this peer
accelerate   transformers' ``from_pretrained(device_map="auto", max_memory=)`` of the checkpoint: layers that fit are in
             memory, others are read from the offload folder at each call; its files' cache is dropped between tokens
in memory    the bundle, read beforehand: what a token costs without a disk

Each runs in a process of its own, which allows itself anonymous memory (RLIMIT_DATA) for what is kept and 1.5 GB, and
asks the kernel (mincore) for the experts' pages after each token. The disk's rate is measured between tokens, on reads
of 4 MB at random places that pass by the cache (O_DIRECT): what it gives just then. ``allowed`` is the tokens a second
that this rate, the bytes read and the time in memory allow: reading and computing in turn. The prompt is random tokens,
one at a time, no cache of keys.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.streaming import RESULTS, VOCABULARY, layer_bytes, machine  # noqa: E402

ROOM, PIECE, SKIPPED = 1_500_000_000, 4 << 20, 8
"""Bytes of anonymous memory beside what is kept; of one read of the disk; tokens before the figures begin."""


class Disk:
    """The rate at which a file is read past the cache."""

    def __init__(self, path: Path) -> None:
        self.file, self.size = os.open(path, os.O_RDONLY | os.O_DIRECT), path.stat().st_size
        self.into = mmap.mmap(-1, PIECE)

    def rate(self, pieces: int = 8) -> float:
        """Bytes a second."""
        started = time.perf_counter()
        for _ in range(pieces):
            os.preadv(self.file, [self.into], random.randrange((self.size - PIECE) // 4096) * 4096)
        return pieces * PIECE / (time.perf_counter() - started)


def bytes_read() -> int:
    return next(int(x.split()[1]) for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("read_bytes"))


def allow(more: int) -> None:
    """No more than ``more`` bytes of data beyond what this process has."""
    used = next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if "VmData" in x)
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, used + more))


def decoded(step: Callable[[Any], Any], file: Path, tokens: int, after: Callable[[], int]) -> dict[str, Any]:
    """Figures of ``tokens`` calls of ``step``; ``after`` keeps the limit and says what of the experts is in memory."""
    import torch

    draw, disk = torch.Generator().manual_seed(1), Disk(file)
    seconds, cpu, rates, held, read = [], [], [], [], []
    for _ in range(SKIPPED + tokens):
        ids = torch.randint(0, VOCABULARY, (1, 1), generator=draw)
        before, used, started = bytes_read(), time.process_time(), time.perf_counter()
        with torch.no_grad():
            step(ids)
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
        read.append(bytes_read() - before)
        held.append(after())
        rates.append(disk.rate())
    kept = slice(SKIPPED, None)
    return {
        "tokens": tokens, "seconds_a_token": statistics.median(seconds[kept]), "each_s": seconds[kept],
        "cpu_seconds_a_token": statistics.median(cpu[kept]), "mb_read_a_token": statistics.mean(read[kept]) / 1e6,
        "disk_mb_s": statistics.median(rates[kept]) / 1e6, "gb_in_memory_by_mincore": max(held[kept]) / 1e9,
    }  # fmt: skip


def pages_of(spans: list[tuple[int, int]]) -> int:
    """Bytes of the spans (address, bytes) that are in memory, as mincore says."""
    import torch

    libc, total = ctypes.CDLL(None), 0
    for address, size in spans:
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        found = torch.empty(-(-(address + size - begin) // mmap.PAGESIZE), dtype=torch.uint8)
        length = ctypes.c_size_t(address + size - begin)
        libc.mincore(ctypes.c_void_p(begin), length, ctypes.c_void_p(found.data_ptr()))
        total += int((found & 1).sum()) * mmap.PAGESIZE
    return total


def spans_of(layers: list[Any]) -> list[tuple[int, int]]:
    """(address, bytes) of each matrix of each expert of each layer."""
    return [(m.data_ptr(), m.numel() * m.element_size()) for layer in layers for expert in layer for m in expert]


def of_moeopt(bundle: Path, source: Path, share: float, tokens: int, kind: str) -> dict[str, Any]:
    """moeopt, plain mmap and in memory, by ``kind``."""
    import moeopt
    from moeopt.bundle.resident import ResidentExperts

    del source
    file = bundle / "weights.safetensors"
    found = moeopt.load(bundle, mapped=True)
    layers = found._runner.expert_layers()
    spans = spans_of(layers)
    total = sum(size for _, size in spans)
    budget = int(total * share)
    if kind == "moeopt":
        del found, layers
        gc.collect()
        found = moeopt.load(bundle, resident=budget)
        spans = spans_of(found._runner.expert_layers())
        allow(ROOM)
        figures = decoded(lambda ids: found(input_ids=ids, use_cache=False), file, tokens, lambda: pages_of(spans))
        return figures | {"hit_rate": found.residency.hit_rate, "enforced": found.residency.enforced}
    if kind == "in memory":
        with file.open("rb") as whole:
            while whole.read(1 << 24):
                pass
        return decoded(lambda ids: found(input_ids=ids, use_cache=False), file, tokens, lambda: pages_of(spans))
    experts = ResidentExperts(budget, file, layers)
    order: dict[int, Any] = {id(e): e for layer in experts._layers for e in layer}  # longest unused first

    def used(number: int, ids: Any) -> None:
        for chosen in ids.reshape(-1).tolist():
            expert = experts._layers[number][chosen]
            order[id(expert)] = order.pop(id(expert))

    def keep_the_limit() -> int:
        held = pages_of(spans)
        for expert in [*order.values()]:
            if held <= budget:
                break
            here = pages_of(expert.pieces)
            if here:
                experts._drop(expert)
                held -= here - pages_of(expert.pieces)
        return held

    found._runner.before_experts = used
    allow(ROOM)
    figures = decoded(lambda ids: found(input_ids=ids, use_cache=False), file, tokens, keep_the_limit)
    return figures | {"enforced": "pages of experts beyond the budget are dropped between tokens, longest unused first"}


def of_accelerate(bundle: Path, source: Path, share: float, tokens: int, kind: str) -> dict[str, Any]:
    import torch
    import transformers

    del bundle, kind
    offload = source.parent / "offloaded"
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    hidden = json.loads((source / "config.json").read_text())["hidden_size"]
    budget = int(share * layers * layer_bytes(hidden)) + 4 * VOCABULARY * hidden + 50_000_000  # embeddings, attention
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": budget}, offload_folder=offload
    ).eval()
    places = dict(model.hf_device_map)
    files = [*offload.rglob("*"), *source.glob("*.safetensors")]

    def drop() -> int:
        for file in files:
            if file.is_file():
                one = os.open(file, os.O_RDONLY)
                os.posix_fadvise(one, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(one)
        return sum(
            p.numel() * p.element_size() for n, p in model.named_parameters() if "experts" in n and not p.is_meta
        )

    drop()
    largest = max(files, key=lambda file: file.stat().st_size)
    figures = decoded(lambda ids: model(input_ids=ids, use_cache=False), largest, tokens, drop)
    figures["gb_in_memory"] = figures.pop("gb_in_memory_by_mincore")
    return figures | {"device_map": places, "enforced": "max_memory=, and the files' cache is dropped between tokens"}


PEERS = {"in memory": of_moeopt, "moeopt": of_moeopt, "plain mmap": of_moeopt, "accelerate": of_accelerate}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--gigabytes", type=float, default=2.0)
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--folder", type=Path, required=True, help="where checkpoint and bundle are")
    words.add_argument("--share", type=float, default=0.5, help="of the experts, that may be in memory")
    words.add_argument("--tokens", type=int, default=24)
    words.add_argument("--turns", type=int, default=2)
    words.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    words.add_argument("--run", help=argparse.SUPPRESS)
    given = words.parse_args()
    told = [word.replace(str(given.folder), "FOLDER") for word in sys.argv[1:]]
    layers = max(round(given.gigabytes * 1e9 / layer_bytes(given.hidden)), 1)
    bundle, source = given.folder / "bundle-torch", given.folder / f"qwen3-like-{layers}x{given.hidden}"
    if given.run:
        print(json.dumps(PEERS[given.run](bundle, source, given.share, given.tokens, given.run)))
        return
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    for _ in range(given.turns):
        for name, found in turns.items():
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], f"--run={name}"], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            found.append(json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"failed": 1})
            print(name, {k: v for k, v in found[-1].items() if k != "each_s"}, file=sys.stderr, flush=True)
    report = {
        "what": "resident", "command": " ".join(["python", "benchmarks/resident.py", *told]), **machine(),
        "layers": layers, "experts_gb": layers * layer_bytes(given.hidden) / 1e9, "share": given.share, "turns": turns,
        "summary": summary(turns),
    }  # fmt: skip
    target = RESULTS / f"resident-{round(given.gigabytes)}gb.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    print(f"written: {target}", file=sys.stderr)


def summary(turns: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each peer the medians of its turns, and the share of the speed that disk and processor allow it."""

    def median(name: str, figure: str) -> float:
        return statistics.median(turn[figure] for turn in turns[name] if figure in turn)

    found = {}
    for name in turns:
        if any("failed" not in turn for turn in turns[name]):
            figures = {f: median(name, f) for f in ("seconds_a_token", "mb_read_a_token", "disk_mb_s")}
            if "in memory" in turns:
                disk = figures["mb_read_a_token"] / figures["disk_mb_s"]
                allowed = median("in memory", "seconds_a_token") + disk
                figures |= {"allowed_s": allowed, "share_of_allowed": allowed / figures["seconds_a_token"]}
            found[name] = figures
    return found


if __name__ == "__main__":
    main()

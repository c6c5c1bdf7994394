"""A file as it was exported beside the same file with its experts replaced, both in ONNX Runtime on a CPU.

    python -m benchmarks.onnx_in --threads 1 --save

The file: a Qwen3-MoE-like model (``--layers 6``, ``--experts 32`` of which 4 are chosen, hidden 512, inner 256), its
experts in the dense form that exporters can hold (every expert on every token), written by torch's exporter with free
sizes. Decode is one token a call, prefill 256; the two sessions take turns on the same ids, and a ratio is the median
of paired calls. ``search`` is the seconds of CPU that finding the regions of a graph of 100 000 nodes takes, and how
often it looks at a node.

Targets: decode 3, prefill 2, search 60 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.blocks import RESULTS

TARGETS = {"decode": 3.0, "prefill": 2.0}
TOKENS = {"decode": 1, "prefill": 256}


class DenseExperts(nn.Module):
    """(B, S, H) -> (B, S, H): SwiGLU experts on every token, weighted by a renormalised top-k table."""

    def __init__(self, hidden: int, inner: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, hidden, 2 * inner) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, hidden) * inner**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        probs = F.softmax(self.gate(rows), -1)
        weights, ids = probs.topk(self.top_k, -1)
        table = torch.zeros_like(probs).scatter(1, ids, weights / weights.sum(-1, keepdim=True))
        gate, up = torch.bmm(rows.unsqueeze(0).expand(len(self.down), -1, -1), self.gate_up).chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.down) * table.t().unsqueeze(-1)
        return y.sum(0).view(x.shape)


class Layer(nn.Module):
    """Attention of one head group and the experts, each behind a norm."""

    def __init__(self, hidden: int, inner: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.mlp = DenseExperts(hidden, inner, experts, top_k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.out(F.softmax(q @ k.transpose(1, 2) * k.shape[-1] ** -0.5, -1) @ v)
        return x + self.mlp(self.after(x))


class DenseLM(nn.Module):
    """(B, S) ids -> (B, S, V) logits."""

    def __init__(self, layers: int, experts: int, hidden: int = 512, inner: int = 256, top_k: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4096, hidden), nn.Linear(hidden, 4096, bias=False)
        self.layers = nn.ModuleList([Layer(hidden, inner, experts, top_k) for _ in range(layers)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def exported(layers: int, experts: int, folder: str) -> Path:
    """The model's file."""
    torch.manual_seed(0)
    path = Path(folder) / "home.onnx"
    free = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    ids = torch.randint(0, 4096, (2, 5))
    torch.onnx.export(
        DenseLM(layers, experts).eval(), (ids,), path, dynamo=True, dynamic_shapes=free, input_names=["input_ids"],
        verbose=False,
    )  # fmt: skip
    return path


def compare(path: Path, threads: int, repeats: int) -> tuple[dict[str, dict[str, float]], dict[str, object]]:
    """Times of the file and of the optimised file, and facts of the second."""
    import onnxruntime

    import moeopt

    started = time.perf_counter()
    optimized = moeopt.optimize(path)
    facts: dict[str, object] = {
        "optimize_seconds": time.perf_counter() - started,
        "passed": optimized.certificate.passed,
        "lowerings": sorted({block.lowering for block in optimized.report.blocks}),
        "rewritten": len(optimized.report.rewritten),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    given = onnxruntime.InferenceSession(str(path), options)
    cells = {}
    for case, tokens in TOKENS.items():
        times: dict[str, list[float]] = {"file": [], "moeopt": []}
        for turn in range(repeats + 3):
            ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(turn))
            calls = {
                "file": lambda ids=ids: given.run(None, {"input_ids": ids.numpy()})[0],
                "moeopt": lambda ids=ids: optimized(ids).numpy(),
            }
            results = {}
            for who in calls if turn % 2 else reversed(calls):
                started = time.perf_counter()
                results[who] = calls[who]()
                if turn >= 3:
                    times[who].append(time.perf_counter() - started)
        far = abs(results["file"] - results["moeopt"]).max() / abs(results["file"]).max()
        cells[case] = {
            "file_ms": 1e3 * statistics.median(times["file"]),
            "moeopt_ms": 1e3 * statistics.median(times["moeopt"]),
            "ratio": statistics.median(a / b for a, b in zip(times["file"], times["moeopt"], strict=True)),
            "largest_difference": float(far),
        }
    return cells, facts


def search(nodes: int) -> dict[str, float]:
    """CPU seconds of finding the regions of a long graph, and how often a node is looked at."""
    from moeopt.onnx_in.index import GraphIndex
    from moeopt.onnx_in.read import read_onnx
    from moeopt.onnx_in.regions import candidate_regions
    from tests.onnx_in.long_graph import model

    file = read_onnx(model(nodes // 27))
    graph = file.model.graph
    started = time.process_time()
    index = GraphIndex(graph)
    found = len(list(candidate_regions(index)))
    seconds = time.process_time() - started
    return {"nodes": len(index.nodes), "regions": found, "seconds": seconds, "looks": index.visited / len(index.nodes)}


def _search_again(nodes: int, threads: int) -> int:
    """Only the search, in the place of that in the saved results."""
    path, looked = RESULTS / f"onnx-in-{threads}t.json", search(nodes)
    print(json.dumps(looked, indent=1))
    path.write_text(json.dumps({**json.loads(path.read_text()), "search": looked}, indent=1) + "\n")
    return int(looked["seconds"] > 60)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("--layers", type=int, default=6)
    words.add_argument("--experts", type=int, default=32)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--repeats", type=int, default=15)
    words.add_argument("--nodes", type=int, default=100_000)
    words.add_argument("--save", action="store_true", help="write the results to benchmarks/results")
    words.add_argument("--search", action="store_true", help="look for regions only, and save that beside the rest")
    words.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    if options.search:
        return _search_again(options.nodes, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        cells, facts = compare(exported(options.layers, options.experts, folder), options.threads, options.repeats)
    looked = search(options.nodes)
    import onnxruntime

    body = {
        "command": "python -m benchmarks.onnx_in " + " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)",
        "versions": {
            "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version(),
        },
        "model": {"layers": options.layers, "experts": options.experts},
        "facts": facts, "cells": cells, "search": looked,
    }  # fmt: skip
    print(json.dumps(body, indent=1))
    if options.save:
        (RESULTS / f"onnx-in-{options.threads}t.json").write_text(json.dumps(body, indent=1) + "\n")
    missed = [case for case, least in TARGETS.items() if cells[case]["ratio"] < least] + ["search"] * (
        looked["seconds"] > 60
    )
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""MoE blocks on a CPU: moeopt's op beside transformers' implementations and a roofline estimate.

    python benchmarks/blocks.py --block mixtral-small --dtype float32 --threads 2

Every peer runs the same transformers experts module on the same tensors; moeopt reads the same
parameters. Peers take turns, in an order that rotates, and the caches are flushed before each call, as
the rest of a model would flush them. Cells are medians in milliseconds. ``estimate`` is
max(bytes of active weights / fastest read probe, FLOPs / fastest GEMM probe), both probed in the same
run; a probe that another tenant of the machine slowed makes the estimate too slow, never too fast.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts

BLOCKS = {"mixtral-small": (8, 2, 1024, 3584), "qwen3-30b": (128, 8, 2048, 768)}
TOKENS = (1, 4, 16, 64, 128, 512)
RESULTS = Path(__file__).parent / "results"


def transformers_experts(E: int, K: int, H: int, I: int, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' own gated-SiLU experts module, with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, hidden_act="silu"
    )
    with torch.device("meta"):
        module = MixtralExperts(config)
    module = module.to(dtype).to_empty(device="cpu").eval()
    for weight in module.parameters():
        weight.detach().uniform_(-0.03, 0.03)
    return module


def peers_of(module: torch.nn.Module, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    bank, spec = StackedExpertWeights([module.gate_up_proj.detach()], module.down_proj.detach()), ExpertsSpec()

    def library(name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            module.config._experts_implementation = name
            return module(x, ids, weights)

        return run

    peers = {
        "moeopt": lambda x, ids, weights: experts(x, ids, weights, bank, spec),
        "eager": library("eager"),
        "grouped_mm": library("grouped_mm"),
        "batched_mm": library("batched_mm"),
    }
    if compiled:
        peers["compiled"] = torch.compile(library("grouped_mm"))
    return peers


def clock() -> float:
    """Wall time; with one thread its CPU time, which leaves out the turns of a machine's other tenants."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def read_rate(buffer: Tensor) -> float:
    """Bytes per second of the fastest of several ways to read a large buffer once."""
    halves = buffer.view(torch.int32)
    matrix = buffer.view(torch.float32).view(-1, 4096)
    vector = torch.ones(4096)
    probes = (lambda: halves.max(), lambda: halves.sum(), lambda: torch.mv(matrix, vector), lambda: matrix.sum())
    return buffer.numel() / min(seconds(probe) for _ in range(3) for probe in probes)


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of several large products."""
    best = 0.0
    for M, N, D in ((512, 2048, 2048), (512, 4096, 1024), (1024, 2048, 2048)):
        x, w = torch.ones(M, D, dtype=dtype), torch.ones(N, D, dtype=dtype)
        probes = (functools.partial(F.linear, x, w), functools.partial(torch.mm, w, x.t()))
        best = max(best, 2 * M * N * D / min(seconds(probe) for _ in range(4) for probe in probes))
    return best


class Rates:
    """The fastest read of memory and the fastest product of this machine, probed again while peers are timed."""

    def __init__(self, buffer: Tensor, dtype: torch.dtype) -> None:
        self.buffer, self.dtype, self.read, self.gemm = buffer, dtype, 0.0, 0.0

    def probe(self) -> None:
        self.read = max(self.read, read_rate(self.buffer))
        self.gemm = max(self.gemm, gemm_rate(self.dtype))

    def milliseconds(self, block: str, tokens: int, active: float) -> tuple[float, float]:
        """What reading the weights of ``active`` experts takes, and what the products of ``tokens`` tokens take."""
        _, K, H, I = BLOCKS[block]
        bytes_read, flops = active * 3 * H * I * self.dtype.itemsize, tokens * K * 6 * H * I
        return 1e3 * bytes_read / self.read, 1e3 * flops / self.gemm


def measure(block: str, dtype: torch.dtype, tokens: list[int], repeats: int, compiled: bool) -> list[dict]:
    """One row per token count: medians in milliseconds per peer, the estimate, and the largest difference."""
    E, K, H, I = BLOCKS[block]
    module = transformers_experts(E, K, H, I, dtype)
    peers = peers_of(module, compiled)
    flush = torch.ones(200 << 20, dtype=torch.uint8)
    rates = Rates(flush, dtype)
    rates.probe()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for T in tokens:
        times: dict[str, list[float]] = {name: [] for name in peers if name != "batched_mm" or T * K <= 32}
        hit, worst = [], 0.0
        for turn in range(repeats + 1):
            x = torch.randn(T, H, generator=generator).to(dtype)
            weights, ids = torch.rand(T, E, generator=generator).topk(K)
            hit.append(ids.unique().numel())
            weights, outputs = weights.to(dtype), {}
            names = list(times)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                flush.add_(1)
                call = peers[name]
                start = clock()
                outputs[name] = call(x, ids, weights)
                if turn:  # the first turn warms up
                    times[name].append(clock() - start)
            want = outputs["eager"].double()
            worst = max(worst, ((outputs["moeopt"] - want).norm() / want.norm()).item())
        active = statistics.mean(hit)
        rates.probe()
        rows.append(
            {
                "tokens": T,
                "active_experts": active,
                "estimate": max(rates.milliseconds(block, T, active)),
                **{name: 1e3 * statistics.median(ts) for name, ts in times.items()},
                "fastest": {name: 1e3 * min(ts) for name, ts in times.items()},
                "relative_difference": worst,
            }
        )
    for row in rows:
        row.update(read_gb_s=rates.read / 1e9, gemm_gflop_s=rates.gemm / 1e9)
    return rows


def show(title: str, rows: list[dict]) -> None:
    rate = f"read {rows[0]['read_gb_s']:.1f} GB/s, GEMM {rows[0]['gemm_gflop_s']:.0f} GFLOP/s"
    print(f"\n{title}; {rate}")
    names = ["estimate", "moeopt", "eager", "grouped_mm", "batched_mm", "compiled"]
    names = [n for n in names if any(n in row for row in rows)]
    print("     T " + "".join(f"{n:>12}" for n in names) + "   best/moeopt  grouped/moeopt")
    for row in rows:
        cells = "".join(f"{row[n]:12.2f}" if n in row else f"{'-':>12}" for n in names)
        best = min(row[n] for n in names if n in row and n not in ("moeopt", "estimate"))
        print(f"{row['tokens']:6d} {cells}{best / row['moeopt']:14.2f}{row['grouped_mm'] / row['moeopt']:16.2f}")
    print(
        "  fastest of each, moeopt first: "
        + "  ".join(f"T={row['tokens']} " + "/".join(f"{t:.2f}" for t in row["fastest"].values()) for row in rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block", choices=BLOCKS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of grouped_mm (slow)")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    import transformers

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    about = {
        "command": " ".join(["python -m benchmarks.blocks", *sys.argv[1:]]),
        "machine": _cpu_name(),
        "threads": args.threads,
        "clock": "CPU time of the one thread" if args.threads == 1 else "wall time",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    for block in args.block or BLOCKS:
        for dtype in args.dtype or ("float32", "bfloat16"):
            rows = measure(block, getattr(torch, dtype), args.tokens, args.repeats, args.compile)
            E, K, H, I = BLOCKS[block]
            show(f"{block} (E={E} K={K} H={H} I={I}) {dtype}, {args.threads} threads, ms", rows)
            if not args.no_save:
                RESULTS.mkdir(exist_ok=True)
                name = f"blocks-{block}-{dtype}-{args.threads}t.json"
                (RESULTS / name).write_text(
                    json.dumps({**about, "block": block, "dtype": dtype, "rows": rows}, indent=1)
                )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

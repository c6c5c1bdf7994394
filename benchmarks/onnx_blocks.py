"""MoE blocks in ONNX Runtime on a CPU: each lowering beside transformers, the MoE kernel and a roofline estimate.

    python benchmarks/onnx_blocks.py --block mixtral-small --threads 2

One session is open at a time, and takes turns with transformers' default (grouped_mm) on the same tensors, so
every cell is a ratio within one run: ``x default`` is default / lowering. ``MoE kernel alone`` is
``com.microsoft::MoE`` fed with ready logits, which no model has: the floor of what that kernel can do. Caches are
flushed before each call. Cells are medians in milliseconds; ``estimate`` is as in ``blocks.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.blocks import BLOCKS, RESULTS, TOKENS, clock, gemm_rate, read_rate, transformers_experts
from moeopt.backends.onnxrt.lower import LOWERINGS
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.onnxrt.session import runtime
from moeopt.ir.specs import ExpertsSpec
from moeopt.onnxgraph.site import Site
from moeopt.ops import StackedBank


def inputs(T: int, E: int, K: int, H: int, generator: torch.Generator) -> dict[str, Tensor]:
    weights, ids = torch.rand(T, E, generator=generator).topk(K)
    return {"x": torch.randn(T, H, generator=generator), "ids": ids, "weights": weights}


def measure(block: str, tokens: list[int], repeats: int, only: list[str]) -> dict[str, object]:
    E, K, H, I = BLOCKS[block]
    module = transformers_experts(E, K, H, I, torch.float32)
    module.config._experts_implementation = "grouped_mm"
    bank = StackedBank([module.gate_up_proj.detach()], module.down_proj.detach())
    site = Site("block", bank, ExpertsSpec(), torch.float32, K, torch.float32)
    flush = torch.ones(200 << 20, dtype=torch.uint8)
    bytes_per_second, flops_per_second = read_rate(flush), gemm_rate(torch.float32)
    table: dict[str, dict[int, dict[str, float]]] = {}
    hit: dict[int, list[int]] = {T: [] for T in tokens}
    for lowering in LOWERINGS:
        refusal = lowering.refuses(site, "cpu")
        if refusal or (only and lowering.name not in only):
            print(f"{lowering.name}: {refusal or 'not asked for'}", file=sys.stderr)
            continue
        start = clock()
        session = session_of(site, lowering)
        table[lowering.name] = {0: {"load": clock() - start}}
        for T in tokens:
            generator = torch.Generator().manual_seed(T)
            times: dict[str, list[float]] = {"lowering": [], "default": []}
            worst = 0.0
            for turn in range(repeats + 2):
                feeds = inputs(T, E, K, H, generator)
                hit[T].append(feeds["ids"].unique().numel())
                outputs = {}
                for name in sorted(times, reverse=bool(turn % 2)):
                    flush.add_(1)
                    start = clock()
                    if name == "lowering":
                        outputs[name] = session.run(feeds)[0]
                    else:
                        outputs[name] = module(feeds["x"], feeds["ids"], feeds["weights"])
                    if turn > 1:  # the first turns warm up
                        times[name].append(clock() - start)
                want = outputs["default"].double()
                worst = max(worst, float((outputs["lowering"] - want).norm() / want.norm()))
            cell = {name: 1e3 * statistics.median(ts) for name, ts in times.items()}
            ratio = statistics.median(d / m for d, m in zip(times["default"], times["lowering"], strict=True))
            table[lowering.name][T] = {**cell, "ratio": ratio, "relative_difference": worst}
            bytes_per_second = max(bytes_per_second, read_rate(flush))
        flops_per_second = max(flops_per_second, gemm_rate(torch.float32))
        del session
    estimate = {
        T: 1e3 * max(statistics.mean(hit[T]) * 3 * H * I * 4 / bytes_per_second, T * K * 6 * H * I / flops_per_second)
        for T in tokens
    }
    rates = {"read_gb_s": bytes_per_second / 1e9, "gemm_gflop_s": flops_per_second / 1e9}
    return {"estimate": estimate, "lowerings": table, **rates}


def show(block: str, found: dict, tokens: list[int]) -> None:
    print(f"{block}, float32, {torch.get_num_threads()} threads; read {found['read_gb_s']:.1f} GB/s, "
          f"GEMM {found['gemm_gflop_s']:.0f} GFLOP/s")  # fmt: skip
    print(f"{'':<18}" + "".join(f"{f'T={T}':>16}" for T in tokens))
    print(f"{'estimate, ms':<18}" + "".join(f"{found['estimate'][T]:>16.1f}" for T in tokens))
    for name, cells in found["lowerings"].items():
        row = "".join(f"{cells[T]['lowering']:>9.1f} ({cells[T]['ratio']:.2f}x)" for T in tokens)
        print(f"{name:<18}{row}   load {cells[0]['load']:.1f} s")
    print("in brackets: how many times faster than transformers' default, median of paired calls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", choices=BLOCKS, default="mixtral-small")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=[], help="names of lowerings")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        found = measure(options.block, options.tokens, options.repeats, options.only)
    show(options.block, found, options.tokens)
    if options.save:
        versions = {"torch": torch.__version__, "onnxruntime": runtime().__version__, "machine": platform.machine()}
        path = Path(RESULTS) / f"onnx-{options.block}-float32-{options.threads}t.json"
        path.write_text(json.dumps({**found, **versions, "command": " ".join(sys.argv)}, indent=1) + "\n")


if __name__ == "__main__":
    main()

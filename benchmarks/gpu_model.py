"""What counts of bytes, FLOPs and launches say of the experts on a GPU that is not here: a model, nothing is executed.

    python -m benchmarks.gpu_model [--gpu h100] [--json FILE] [--host]

For each block and number of tokens: the floor (weights by bandwidth, or FLOPs by peak), the kernels in a CUDA graph
beside it, and the loop that home-made blocks run and transformers' ``grouped_mm``, by the launches, waits and bytes
that their calls have when counted on this CPU. ``--host`` measures what the host takes for a call of the kernels
outside of a graph (Triton's own launcher on this CPU; a driver that starts nothing).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import model
from benchmarks.gpu.model_peers import grouped, own

MICRO = 1e6


def row(block: str, T: int, gpu: model.Gpu) -> dict[str, Any]:
    """One cell of the table; times in microseconds."""
    c = model.cell(block, T)
    log = model.launched(c, gpu)
    kernels = {one.name: model.SECONDS[one.name](one, c, gpu) for one in log}
    device = sum(max(bounds.values()) + gpu.gap for bounds in kernels.values())
    least, loop, library = model.floor(c, gpu), own(c, gpu), grouped(c, gpu)
    return {
        "block": block, "T": T, "experts hit": c.hit, "floor": least * MICRO,
        "moeopt": {
            "launches": len(log), "waits": 0, "in a graph": device * MICRO, "of the floor": device / least,
            "kernels": {name: {by: s * MICRO for by, s in bounds.items()} for name, bounds in kernels.items()},
        },
        "own loop": _peer(loop), "grouped_mm": _peer(library),
        "own loop / moeopt": loop.eager / device, "grouped_mm / moeopt": library.device / device,
    }  # fmt: skip


def _peer(peer: Any) -> dict[str, float]:
    return {
        "launches": peer.launches, "waits": peer.waits, "bytes of activations": peer.bytes,
        "device": peer.device * MICRO, "eager": peer.eager * MICRO,
    }  # fmt: skip


def host(E: int, K: int, T: int) -> float:
    """Microseconds of this CPU for one call of the kernels on E experts' separate weights, the median of 30."""
    from triton.runtime import driver

    from moeopt.ir.specs import ExpertsSpec
    from moeopt.ops import ListExpertWeights
    from moeopt.ops.triton.launch import experts_triton
    from tests.ops.triton.launched import Driver

    driver.set_active(Driver(90, 227))
    part = [[torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(E)] for _ in range(3)]
    bank = ListExpertWeights(part[:2], part[2])
    ids, x = torch.rand(T, E).topk(K).indices, torch.zeros(T, 64, dtype=torch.bfloat16)
    taken = []
    for _ in range(33):
        started = time.thread_time()
        experts_triton(x, ids, torch.zeros(T, K, dtype=torch.bfloat16), bank, ExpertsSpec(rows="separate"))
        taken.append(time.thread_time() - started)
    return statistics.median(taken[3:]) * MICRO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=model.GPUS, default="h100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--host", action="store_true")
    chosen = parser.parse_args()
    gpu = model.GPUS[chosen.gpu]
    rows = [row(block, T, gpu) for block in model.BLOCKS for T in model.TOKENS]
    print("| block | T | floor us | moeopt, in a graph | launches | own loop: launches, waits | us | grouped_mm |")
    for r in rows:
        ours, loop, library = r["moeopt"], r["own loop"], r["grouped_mm"]
        print(
            f"| {r['block']} | {r['T']} | {r['floor']:.0f} | {ours['in a graph']:.0f} ({ours['of the floor']:.2f}) | "
            f"{ours['launches']} | {loop['launches']}, {loop['waits']} | {loop['eager']:.0f} "
            f"({r['own loop / moeopt']:.1f}) | {library['launches']} ({r['grouped_mm / moeopt']:.2f}) |"
        )
    found: dict[str, Any] = {"executed": "nothing: a model", "gpu": gpu._asdict(), "rows": rows}
    if chosen.host:
        found["host us"] = {f"E={E} K={K} T={T}": host(E, K, T) for E, K, T in ((8, 2, 1), (128, 8, 1), (128, 8, 512))}
        print("host us a call outside of a graph, on this CPU:", found["host us"])
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1, default=lambda v: round(v, 3)) + "\n")


if __name__ == "__main__":
    main()

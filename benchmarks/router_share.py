"""What a router costs beside its experts in one decode step: the most that a kernel with the router inside could save.

    OMP_NUM_THREADS=1 python -m benchmarks.router_share --save

One token, float32, one thread, CPU time of the thread. ``logits`` is the gate's matmul, which any form must do;
``choice`` is what follows: softmax, top-k and the sum that renormalises, as PyTorch's own calls, with the cost of each
call from Python. ``experts`` is moeopt's op, ``share`` is choice / (logits + choice + experts). Caches are written over
before each of the experts' calls where the weights are larger than the caches; medians of turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.blocks import RESULTS
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights, experts
from moeopt.ops.measured import cpu_model

SIZES = {"tiny": (8, 2, 16, 16), "qwen3-like": (32, 4, 512, 384), "mixtral-small": (8, 2, 1024, 3584),
         "qwen3-30b, 16 of its experts": (16, 8, 2048, 768)}  # fmt: skip
TURNS = 40


def median(call: Callable[[], object], flush: torch.Tensor | None) -> float:
    """Microseconds of a call."""
    found = []
    for _ in range(TURNS):
        if flush is not None:
            flush.add_(1)
        began = time.thread_time()
        call()
        found.append(time.thread_time() - began)
    return 1e6 * statistics.median(found)


def cells(E: int, K: int, H: int, I: int) -> dict[str, float]:
    """Microseconds of each part for one token."""
    gate, x = torch.randn(E, H) / H**0.5, torch.randn(1, H)
    bank = StackedExpertWeights([torch.rand(E, 2 * I, H) / H], torch.rand(E, H, I) / I)
    logits = x @ gate.t()

    def choice() -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = logits.softmax(-1).topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    weights, ids = choice()
    large = torch.ones(64 << 20, dtype=torch.uint8) if E * I * H > 1 << 20 else None
    found = {
        "logits": median(lambda: torch.nn.functional.linear(x, gate), None),
        "choice": median(choice, None),
        "experts": median(lambda: experts(x, ids, weights, bank, ExpertsSpec()), large),
    }
    return found | {"share": found["choice"] / sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/router-share.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    rows = {name: cells(*sizes) for name, sizes in SIZES.items()}
    for name, row in rows.items():
        print(f"{name:30}" + "  ".join(f"{part} {us:9.1f}" for part, us in row.items() if part != "share")
              + f"  microseconds, share {row['share']:.3f}")  # fmt: skip
    if asked.save:
        about = {"cpu": cpu_model(), "torch": torch.__version__, "clock": "CPU time of the thread, one thread",
                 "command": " ".join(["python -m benchmarks.router_share", *sys.argv[1:]])}  # fmt: skip
        (RESULTS / "router-share.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

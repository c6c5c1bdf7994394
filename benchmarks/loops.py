"""Home-made loops over 64 experts beside the same blocks after ``moeopt.optimize``: what a Python loop costs.

    OMP_NUM_THREADS=1 python benchmarks/loops.py

Medians of 7 interleaved calls, float32, CPU time of one torch thread, which leaves out the turns of a machine's
other tenants. The rewritten block is timed as users call it, with its guards.

Legend: T tokens, E experts, K chosen per token, H hidden, I intermediate.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import moeopt

E, K, H, I = 64, 4, 512, 1024
TOKENS, REPEATS, WARMUP = (1, 16, 128), 7, 2


class Expert(nn.Module):
    """A gated expert of three Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((H, I), (H, I), (I, H)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class IndexAdd(nn.Module):
    """Each expert gets its rows and adds its answer with ``index_add_``."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self.router(x_TH).softmax(-1).topk(K)
        y_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids_TK == e)
            y_TH.index_add_(0, token, expert(x_TH[token]) * weights_TK[token, slot, None])
        return y_TH


class BooleanMask(IndexAdd):
    """Each expert of each slot gets its rows by a boolean mask and is skipped when there are none."""

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        weights_TK, ids_TK = self.router(x_TH).softmax(-1).topk(K)
        y_TH = torch.zeros_like(x_TH)
        for k in range(K):
            for e, expert in enumerate(self.experts):
                mask_T = ids_TK[:, k] == e
                if mask_T.any():
                    y_TH[mask_T] += expert(x_TH[mask_T]) * weights_TK[mask_T, k, None]
        return y_TH


def milliseconds(peers: dict[str, nn.Module], x_TH: torch.Tensor) -> dict[str, float]:
    """The median of each peer's calls, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(WARMUP + REPEATS):
        for name, peer in peers.items():
            started = time.process_time()
            peer(x_TH)
            if turn >= WARMUP:
                taken[name].append((time.process_time() - started) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{processor()}, torch {torch.__version__}, 1 thread, float32, E={E} K={K} H={H} I={I}\n")
    print("| block | tokens | as written, ms | moeopt, ms | ratio |\n|---|---|---|---|---|")
    for kind in (IndexAdd, BooleanMask):
        torch.manual_seed(0)
        block = kind().eval()
        fast = moeopt.optimize(block, torch.randn(32, H))
        if not fast.report.rewritten or not fast.certificate.passed:
            raise SystemExit(f"{kind.__name__} was not rewritten:\n{fast.report}")
        for tokens in TOKENS:
            with torch.no_grad():
                took = milliseconds({"loop": block, "moeopt": fast.model}, torch.randn(tokens, H))
            ratio = took["loop"] / took["moeopt"]
            print(f"| {kind.__name__} | {tokens} | {took['loop']:.2f} | {took['moeopt']:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

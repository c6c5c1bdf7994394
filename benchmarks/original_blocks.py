"""Small home-made blocks beside themselves rewritten: where is a rewritten block slower than no rewrite at all?

    OMP_NUM_THREADS=1 python -m benchmarks.original_blocks --shapes 4x64x64 16x256x512 --dtypes float32 bfloat16

A shape is experts x hidden x intermediate. A cell is the median, over turns in both orders, of the original's time
divided by the rewritten block's, guards, router and call included, in CPU time of the thread: below 1, the rewrite is
the slower. The weights stay in cache, so what is compared is products and overhead, not memory.

Legend: T tokens, E experts, K chosen per token, H hidden, I intermediate.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeopt
from moeopt.rewrite.install import rewritten_forward


def gated(H: int, I: int) -> nn.Module:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((H, I), (H, I), (I, H)))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    return Gated()


def plain(H: int, I: int) -> nn.Module:
    return nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H))


class Loop(nn.Module):
    """Each expert that is hit gets its rows and adds its answer with ``index_add_``."""

    def __init__(self, E: int, K: int, H: int, I: int, expert=gated) -> None:
        super().__init__()
        self.K, self.router = K, nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(expert(H, I) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.K)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class Every(Loop):
    """Every expert on every token."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return (torch.stack([e(x) for e in self.experts], 1) * weights.unsqueeze(-1)).sum(1)


class Stacked(nn.Module):
    """Stacked (in, out) weights, in a loop over the experts that are hit."""

    def __init__(self, E: int, K: int, H: int, I: int) -> None:
        super().__init__()
        self.K, self.router = K, nn.Linear(H, E, bias=False)
        self.w_in, self.w_out = (nn.Parameter(torch.randn(E, a, b) / a**0.5) for a, b in ((H, 2 * I), (I, H)))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.K)
        y = torch.zeros_like(x)
        for e in range(len(self.w_in)):
            token, slot = torch.where(ids == e)
            if token.numel():
                gate, up = (x[token] @ self.w_in[e]).chunk(2, -1)
                y.index_add_(0, token, ((F.silu(gate) * up) @ self.w_out[e]) * weights[token, slot, None])
        return y


BLOCKS = {
    "loop, gated": Loop,
    "loop, plain with bias": lambda *sizes: Loop(*sizes, expert=plain),
    "loop, stacked (in, out)": Stacked,
    "every expert, plain": lambda *sizes: Every(*sizes, expert=plain),
}


def ratio(
    original: Callable[[Tensor], object], rewritten: Callable[[Tensor], object], x: Tensor, seconds: float
) -> float:
    """The median of original / rewritten over turns that take about ``seconds`` in all.

    One thread is timed by its CPU time, several by the clock.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = original, rewritten
    for call in (*calls, *calls):
        call(x)
    start = clock()
    for call in calls:
        call(x)
    once = clock() - start
    several = max(1, round(0.004 / once))
    turns, taken = min(60, max(7, round(seconds / (several * once)))), ([], [])
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = clock()
            for _ in range(several):
                calls[which](x)
            taken[which].append(clock() - start)
    return statistics.median(a / b for a, b in zip(*taken, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4x64x64", "8x128x256", "16x256x512"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--top", type=int, default=2, help="experts of a token")
    parser.add_argument("--seconds", type=float, default=0.1, help="CPU time of a cell")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for dtype in asked.dtypes:
        for shape in asked.shapes:
            E, H, I = map(int, shape.split("x"))
            for name, make in BLOCKS.items():
                torch.manual_seed(0)
                block = make(E, asked.top, H, I).to(getattr(torch, dtype)).eval()
                x = torch.randn(max(24, *asked.tokens), H).to(getattr(torch, dtype))
                fast = moeopt.optimize(copy.deepcopy(block), x[:24], verify="off").model
                assert rewritten_forward(fast) is not None, "the block was declined"
                cells = (f"T={T} {ratio(block, fast, x[:T], asked.seconds):.2f}" for T in asked.tokens)
                print(f"{dtype} {shape} {name}: {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()

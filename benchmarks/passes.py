"""What each optional pass saves: one block with the pass and without it, in turn, on the same weights.

    python benchmarks/passes.py                  PyTorch, then ONNX Runtime's CPU provider
    python benchmarks/passes.py torch            one of them

The blocks hold what the passes look for: a copy kept for a later sum, a constant factor, a softmax over all experts.
Seconds are medians of calls that alternate; with one thread the clock is CPU time.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeopt

TOKENS = (1, 4, 16, 128, 1024)
CALLS = 41


@dataclasses.dataclass(frozen=True)
class Size:
    """E experts of which K run, H hidden, I intermediate."""

    E: int
    K: int
    H: int
    I: int  # noqa: E741

    def __str__(self) -> str:
        return f"{self.E} experts, top-{self.K}, hidden {self.H}, intermediate {self.I}"


SIZES = (Size(8, 2, 1024, 512), Size(64, 8, 512, 128))


class Block(nn.Module):
    """A loop over the experts that are hit."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.router = nn.Linear(size.H, size.E, bias=False)
        self.w_in = nn.Parameter(torch.randn(size.E, size.I, size.H) * size.H**-0.5)
        self.w_out = nn.Parameter(torch.randn(size.E, size.H, size.I) * size.I**-0.5)

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = self.router(x_TH).softmax(-1).topk(self.size.K)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        for e in ids_TK.unique().tolist():
            token, slot = torch.where(ids_TK == e)
            rows = F.silu(x_TH[token] @ self.w_in[e].t()) @ self.w_out[e].t()
            y_TH.index_add_(0, token, rows * weights_TK[token, slot, None])
        return y_TH


class Copies(Block):
    def forward(self, x_TH: Tensor) -> Tensor:
        residual_TH = x_TH.clone()
        return super().forward(x_TH) + residual_TH


class Scaled(Block):
    def forward(self, x_TH: Tensor) -> Tensor:
        return super().forward(x_TH) * 2.5


PASSES = {"drop_copies": Copies, "fold_expert_scale": Scaled, "shrink_router_softmax": Block}


def in_turn(forms: tuple[Callable[..., Any], Callable[..., Any]], x_TH: Tensor) -> tuple[float, float]:
    """Median seconds of each of two callables."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(CALLS + 4):
            for which in (0, 1) if turn % 2 else (1, 0):
                started = clock()
                forms[which](x_TH)
                if turn >= 4:
                    times[which].append(clock() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def table(backend: str) -> None:
    """One line for each pass, size and number of tokens: milliseconds without the pass, with it, and their ratio."""
    fields: dict[str, Any] = {"backend": backend, "verify": "off"}
    if backend == "onnxruntime":
        import onnxruntime

        fields["session_options"] = onnxruntime.SessionOptions()
        fields["session_options"].intra_op_num_threads = torch.get_num_threads()
    for name, make in PASSES.items():
        for size in SIZES:
            torch.manual_seed(0)
            block, x_TH = make(size).eval(), torch.randn(16, size.H)
            without = moeopt.optimize(block, x_TH, only_passes="group_experts", **fields)
            with_it = moeopt.optimize(block, x_TH, only_passes=("group_experts", name), **fields)
            if not any(r.name == name and r.fired for r in with_it.report.passes):
                print(f"| {name} | {backend} | {size} | does not run |")
                continue
            cells = []
            for tokens in TOKENS:
                before, after = in_turn((without, with_it), torch.randn(tokens, size.H))
                cells.append(f"{1e3 * before:.3f} -> {1e3 * after:.3f} ({before / after:.2f})")
            print(f"| {name} | {backend} | {size} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ms without -> with the pass (ratio)")
    print(f"| pass | backend | block | {' | '.join(f'{t} tokens' for t in TOKENS)} |")
    print(f"|---|---|---|{'---|' * len(TOKENS)}")
    for backend in sys.argv[1:] or ("torch", "onnxruntime"):
        table(backend)


if __name__ == "__main__":
    main()

"""What Python costs around the experts: a rewritten block beside the block itself, one token, sizes that cost nothing.

    OMP_NUM_THREADS=1 python -m benchmarks.block_overhead            a table
    OMP_NUM_THREADS=1 python -m benchmarks.block_overhead --check    exit code 1 where a rewritten block is the slower

Guards, router, weights and the call of the kernel are all there is at H = 16 and one token. Each cell is the fastest of
many short runs in turns, in CPU time of the thread, which leaves out the turns of a machine's other tenants; the ratio
is the rewritten block's time divided by the block's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import timeit
import types
from typing import Any

import torch
from torch import nn

import moeopt
from benchmarks.guards import Layer, Nested
from moeopt.rewrite.install import rewritten_forward

RUNS, CALLS = 60, 50


class Gathered(nn.Module):
    """A home-made block that gathers the chosen experts' weights: no loop, a dozen operations."""

    def __init__(self, H: int = 16, I: int = 16, E: int = 8, K: int = 2) -> None:
        super().__init__()
        self.gate, self.K = nn.Linear(H, E, bias=False), K
        self.w1, self.w2 = nn.Parameter(torch.randn(E, 2 * I, H)), nn.Parameter(torch.randn(E, H, I))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, H)."""
        w, ids = self.gate(x).softmax(-1).topk(self.K, -1)
        g, u = torch.einsum("tkoh,th->tko", self.w1[ids], x).chunk(2, -1)
        return torch.einsum("tkhi,tki,tk->th", self.w2[ids], nn.functional.silu(g) * u, w)


def _layer(E: int, K: int) -> tuple[nn.Module, Any]:
    config = types.SimpleNamespace(moe=dataclasses.replace(Nested(), top_k=K), scale=1.5)
    return Layer(config, E=E), torch.randn(2, 9, 16)


def _mixtral(implementation: str) -> tuple[nn.Module, Any]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.1)
    return block, torch.randn(2, 9, 16)


BLOCKS = {
    "home-made loop, 6 experts, top-2": lambda: _layer(6, 2),
    "home-made loop, 64 experts, top-8": lambda: _layer(64, 8),
    "home-made gather, 8 experts, top-2": lambda: (Gathered(), torch.randn(18, 16)),
    "Mixtral, eager": lambda: _mixtral("eager"),
    "Mixtral, grouped_mm": lambda: _mixtral("grouped_mm"),
    "Mixtral, batched_mm": lambda: _mixtral("batched_mm"),
}


def compare(make: Any) -> tuple[float, float]:
    """Microseconds of one call with one token: the block's own, and the rewritten block's."""
    torch.manual_seed(0)
    block, inputs = make()
    optimised = moeopt.optimize(block.eval(), inputs, verify="off").model
    assert any(rewritten_forward(m) is not None for m in optimised.modules()), "the block was declined"
    one = inputs.reshape(-1, inputs.shape[-1])[:1]
    one = one[None] if inputs.dim() == 3 else one
    calls = (lambda: block(one)), (lambda: optimised(one))
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for times, call in zip(took, calls, strict=True):
            times.append(timeit.timeit(call, timer=time.thread_time, number=CALLS) / CALLS * 1e6)
    return min(took[0]), min(took[1])


def main() -> int:
    """Print the table; the exit code says whether no rewritten block is the slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    worst = 0.0
    print(f"{'one token, H = 16':36} {'its own':>9} {'rewritten':>9} {'ratio':>6}   microseconds a call")
    for name, make in BLOCKS.items():
        own, rewritten = compare(make)
        print(f"{name:36} {own:9.1f} {rewritten:9.1f} {rewritten / own:6.2f}", flush=True)
        worst = max(worst, rewritten / own)
    return int(asked.check and worst > 1)


if __name__ == "__main__":
    raise SystemExit(main())

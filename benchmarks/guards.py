"""What a rewritten block asks before each call about its code, its configuration and its source: microseconds.

    python -m benchmarks.guards            a table
    python -m benchmarks.guards --check    exit code 1 when a check takes longer than LIMIT

Each cell is the fastest of many short runs, which leaves out the turns of a machine's other tenants. What is measured
is the whole comparison of one call (``moeopt.rewrite.module_guard``, ``reads``, ``source``), without the experts' own
modules, which are compared where an expert runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import timeit
import types
from typing import Any

import torch
from torch import nn

import moeopt
from moeopt.rewrite.install import RewrittenForward, rewritten_forward

LIMIT = 3.0
"""Microseconds a block call."""
RUNS, CALLS = 1000, 100


@dataclasses.dataclass
class Nested:
    """A configuration inside a configuration."""

    top_k: int = 2
    renormalise: bool = True


class Layer(nn.Module):
    """A home-made block that reads its configuration at each call."""

    def __init__(self, config: Any, H: int = 16, E: int = 6) -> None:
        super().__init__()
        self.config, self.router = config, nn.Linear(H, E)
        self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, H)) for _ in range(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (batch, tokens, H)."""
        rows, moe = x.reshape(-1, x.shape[-1]), self.config.moe
        w, ids = self.router(rows).softmax(-1).topk(moe.top_k, -1)
        if moe.renormalise:
            w = w / w.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.ffn):
            t, k = torch.where(ids == e)
            if t.numel():
                y.index_add_(0, t, expert(rows[t]) * w[t, k, None])
        return y.view_as(x) * self.config.scale


def _mixtral() -> tuple[nn.Module, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8,
    )  # fmt: skip
    return MixtralForCausalLM(config), {"input_ids": torch.arange(12).reshape(1, 12)}


def _layer(E: int) -> tuple[nn.Module, Any]:
    return Layer(types.SimpleNamespace(moe=Nested(), scale=1.5), E=E), torch.randn(2, 9, 16)


BLOCKS = {
    "home-made, 6 experts": lambda: _layer(6),
    "home-made, 64 experts": lambda: _layer(64),
    "transformers' Mixtral": _mixtral,
}


def forward_of(make: Any) -> RewrittenForward:
    """The first rewritten block of a model, and the model that it came from."""
    torch.manual_seed(0)
    model, inputs = make()
    optimised = moeopt.optimize(model.eval(), inputs, verify="off").model
    forward = next(f for m in optimised.modules() if (f := rewritten_forward(m)) is not None)
    forward.kept_alive = model  # type: ignore[attr-defined]
    return forward


def microseconds(call: Any) -> float:
    """The fastest run's time for one call."""
    return min(timeit.repeat(call, number=CALLS, repeat=RUNS)) / CALLS * 1e6


def main() -> int:
    """Print the table; the exit code says whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    slowest = 0.0
    print(f"{'block':24} {'own code':>9} {'source':>9} {'together':>9}   microseconds a call")
    for name, make in BLOCKS.items():
        forward = forward_of(make)
        source = forward.source
        assert source is not None and not forward.change()
        own, other, both = (microseconds(c) for c in (forward.watch.shared, source.look, forward.change))
        print(f"{name:24} {own:9.2f} {other:9.2f} {both:9.2f}")
        slowest = max(slowest, both)
    if asked.check:
        print(f"limit {LIMIT} us: {'held' if slowest <= LIMIT else 'missed'} (slowest {slowest:.2f} us)")
    return int(asked.check and slowest > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())

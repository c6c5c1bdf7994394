"""Shared by the tests of the passes: small mixtures whose routing, dispatch and sum can each be swapped."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moeopt.capture.tape import Tape, record
from moeopt.options import Options
from moeopt.passes.base import PassRecord
from moeopt.passes.group_experts import GroupExperts
from moeopt.passes.manager import PassManager
from moeopt.pipeline.block import Rewrite, rewrite_block
from tests.capture.tiny import rand

E, H, I, K, T = 4, 8, 12, 2, 24


def ffn(act: type[nn.Module] = nn.ReLU, bias: bool = True, inner: int = I, hidden: int = H) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, inner, bias=bias), act(), nn.Linear(inner, hidden, bias=bias))


class GLU(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor] = nn.functional.silu) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False)
        self.down, self.act = nn.Linear(I, H, bias=False), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class HandsOn(nn.Module):
    """Returns its argument in another shape: the same memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, H)


class MoE(nn.Module):
    """Softmax, top-k, a loop over experts; each test overrides what it is about."""

    top_k = K

    def __init__(self, make: Callable[[], nn.Module] = ffn, experts: int = E, **parts: Any) -> None:
        super().__init__()
        self.router = nn.Linear(H, experts)
        self.experts = nn.ModuleList(make() for _ in range(experts))
        for name, part in parts.items():
            setattr(self, name, part)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w, ids = self.router(x).softmax(-1).topk(self.top_k)
        return w / w.sum(-1, keepdim=True), ids

    def mix(self, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t]) * w[t, k, None])
        return y

    def forward(self, x: torch.Tensor) -> Any:
        return self.mix(x, *self.route(x))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """``make()`` in eval mode under a seed; the router's rows are evened so that every expert is reached."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def tape_of(make: Callable[[], nn.Module], *args: Any, tokens: int = T, seed: int = 0) -> Tape:
    """The tape of the seeded module on ``args``, or on (tokens, H) random rows."""
    return record(seeded(make, seed), args or (rand(tokens, H, seed=7),))


def through(
    make: Callable[[], nn.Module], *passes: Any, x: torch.Tensor | None = None, **fields: Any
) -> tuple[Rewrite, dict[str, PassRecord]]:
    """The seeded module through grouping and then ``passes``, verified strictly; its records by pass.

    ``fields`` are those of the manager; ``engine`` is True and all are named, so that no pass is left out.
    """
    every = (GroupExperts(), *passes)
    manager = PassManager(every, **{"engine": True, "only": [p.name for p in every]} | fields)
    call = ((rand(6, H) if x is None else x,), {})
    rewrite = rewrite_block("block", seeded(make), call, Options(), manager=manager)
    return rewrite, {r.name: r for r in rewrite.passes.records}

"""What the model of ``model.py`` gives for a home-made loop and for transformers' ``grouped_mm``: counted calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.blocks import block, own_loop
from benchmarks.gpu.counted import counts
from benchmarks.gpu.model import Cell, Gpu, floor


class Peer(NamedTuple):
    """A path's kernels and waits, what its activations move (bytes), and seconds below which it can't be.

    ``device`` is the GPU's time of all kernels back to back; ``eager`` the longer of it and of the host's.
    """

    launches: int
    waits: int
    bytes: int
    device: float
    eager: float


def own(c: Cell, gpu: Gpu) -> Peer:
    """The loop that home-made blocks run: every expert asks which tokens are its own."""

    def call(H: int, I: int) -> Callable[[], Tensor]:
        b = block(c.E, c.K, H, I, c.T, torch.bfloat16, "cpu")._replace(ids=c.ids)
        return lambda: own_loop(b)

    return _peer(call, c, gpu)


def grouped(c: Cell, gpu: Gpu) -> Peer:
    """transformers' experts with ``grouped_mm``, which is one kernel in bfloat16 on an H100."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def call(H: int, I: int) -> Callable[[], Tensor]:
        config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=c.E, num_experts_per_tok=c.K)
        config._experts_implementation = "grouped_mm"
        experts = Qwen3MoeExperts(config).bfloat16()
        torch.nn.init.zeros_(experts.gate_up_proj)
        torch.nn.init.zeros_(experts.down_proj)
        x, weights = torch.zeros(c.T, H, dtype=torch.bfloat16), torch.zeros(c.T, c.K, dtype=torch.bfloat16)
        return lambda: experts(x, c.ids, weights)

    return _peer(call, c, gpu)


def _peer(call: Callable[[int, int], Callable[[], Tensor]], c: Cell, gpu: Gpu) -> Peer:
    launches, waits, moved = counts(call, c.H, c.I)
    memory = (c.hit * c.matrix(3) + moved) / gpu.memory_rate
    device = max(memory, floor(c, gpu)) + launches * gpu.gap
    return Peer(launches, waits, moved, device, max(device, launches * gpu.op + waits * gpu.wait))

"""KTransformers' CPU kernels as a peer: ``pip install kt-kernel gguf``, whose wheel picks a build for this CPU.

Its ``AMXInt8_MOE`` and ``AMXInt4_MOE`` run on AVX-512 where there are no tiles. They take bfloat16 weights, round them
anew with one scale for each row, and round the rows of x to 8 bits with one scale each; rows come and go in bfloat16.
Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = {"int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}
_LONGEST = 512
"""Tokens of the longest call."""


class KTransformersExperts:
    """A block's experts, computed by one thread.

    Args:
        gate_up: (E, 2 I, H), gates first. down: (E, H, I).
        dtype: "int8" or "int4".
    """

    def __init__(self, gate_up: Tensor, down: Tensor, K: int, dtype: str) -> None:
        import kt_kernel

        extension: Any = kt_kernel.kt_kernel_ext
        threads = extension.WorkerPoolConfig()
        threads.subpool_count, threads.subpool_numa_map, threads.subpool_thread_count = 1, [0], [1]
        self._pool, self._chosen = extension.CPUInfer(threads), K
        (E, double, H), kept = gate_up.shape, gate_up.bfloat16()
        self._weights = [half.contiguous() for half in kept.chunk(2, dim=1)] + [down.bfloat16().contiguous()]
        config = extension.moe.MOEConfig(E, K, H, double // 2, 0)
        config.pool, config.max_len, config.layer_idx = self._pool.backend_, _LONGEST, 0
        config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in self._weights)
        self._experts = getattr(extension.moe, KINDS[dtype])(config)
        order = torch.arange(E)
        self._pool.submit(self._experts.load_weights_task(order.data_ptr()))
        self._pool.sync()

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, count = x.bfloat16().contiguous(), torch.tensor([len(x)], dtype=torch.int32)
        ids, weights, y = ids.contiguous(), weights.float().contiguous(), torch.zeros_like(rows)
        pointers = [t.data_ptr() for t in (ids, weights, rows, y)]
        self._pool.submit(self._experts.forward_task(count.data_ptr(), self._chosen, *pointers, False))
        self._pool.sync()
        return y.to(x.dtype)

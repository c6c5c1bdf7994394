"""Seconds of one call as its device takes them: events behind a cold L2 on a GPU, a clock of the host on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

CPU_FLUSH = 32 << 20
"""At most so many bytes are written between calls on a CPU."""


class Stopwatch:
    """Times calls whose tensors are on ``device``.

    On a GPU the time between two events is the device's own: what the host takes to launch is hidden behind the
    writing of the flush, as it is in a model that keeps the device busy. On a CPU with one thread the clock is the
    thread's CPU time, which leaves out the turns of a machine's other tenants.

    Args:
        flush: bytes to write before each call: what the rest of the model would read, so that the call's weights are
            not in a cache by luck; at most ``CPU_FLUSH`` on a CPU, and twice the L2 cache on a GPU.
    """

    def __init__(self, device: torch.device, flush: int) -> None:
        self._device = device
        most = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_FLUSH
        self._scratch = _zeros(min(flush, most) // 4, device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The time of one call."""
        self._scratch.add_(1)
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            call()
            end.record(stream)
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        call()
        return clock() - started


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, device=device)

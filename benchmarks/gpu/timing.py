"""How a call is timed and watched on a GPU: events, a cold L2, CUDA graphs, waits for the host."""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

L2_BYTES = 256 << 20
"""More than any L2 of today, so that weights are read from memory as in a model of many layers."""


def told(step: str, name: str, **what: Any) -> None:
    """One result, on a line that the script collects."""
    print("RESULT " + json.dumps({"step": step, "name": name, "ok": True, **what}, default=str), flush=True)


def tried(step: str, name: str, call: Callable[[], dict[str, Any]]) -> None:
    """The results of ``call``, or its error with the last three places; the step goes on."""
    started = time.time()
    try:
        told(step, name, **call(), s=round(time.time() - started, 1))
    except Exception as err:  # noqa: BLE001  what fails on that machine is a result
        at = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(err.__traceback__)][-3:]
        told(step, name, ok=False, error=f"{type(err).__name__}: {err}"[:400], at=at)


def microseconds(device: str, call: Callable[[], Any], times: int = 11) -> float:
    """The median of ``times`` calls, each with a cold L2."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(times if device == "cuda" else 1):
        if device == "cpu":
            started = time.perf_counter()
            call()
            taken.append(1e6 * (time.perf_counter() - started))
            continue
        _scratch().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(1e3 * start.elapsed_time(end))
    return round(sorted(taken)[len(taken) // 2], 2)


@functools.cache
def _scratch() -> torch.Tensor:
    return torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")


def in_a_graph(device: str, call: Callable[[], Any]) -> float | str | None:
    """Microseconds of the call's replay as a CUDA graph, or why it can't be captured.

    A call that waits for the GPU is not tried: a capture that breaks off leaves PyTorch's own random generator in the
    capture, and whatever draws a number after that in this process is an error.
    """
    if device == "cpu":
        return None
    if waiting := waits(device, call):
        return f"not tried, for it waits: {waiting}"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as err:  # noqa: BLE001  the reason is the result
        torch.cuda.synchronize()
        return f"{type(err).__name__}: {str(err).splitlines()[0]:.120}"
    return microseconds(device, graph.replay)


def waits(device: str, call: Callable[[], Any]) -> str | bool | None:
    """What waits for the GPU, as torch's debug mode says it; False where nothing does."""
    if device == "cpu":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        return False
    except RuntimeError as err:
        return f"{str(err).splitlines()[0]:.100}"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(device: str, call: Callable[[], Any]) -> int | None:
    """How many kernels the call launches, counted by torch's profiler."""
    if device == "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)

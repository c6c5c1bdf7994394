"""Devices to plan for: a few GPUs from their makers' sheets, and this machine, measured.

Memory in bytes (sheets count 10^9), bandwidth in bytes/s, compute in FLOP/s of dense products with 16-bit inputs and
32-bit sums (without the factor 2 of structured sparsity). Peaks: real kernels reach 60 to 90 % of them.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moeopt.errors import UsageError

_HOPPER = "https://www.nvidia.com/en-us/data-center/h100/"
_AMPERE = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"


@dataclass(frozen=True)
class Device:
    """One device. ``measured`` is true for this machine, whose figures are a probe's and not a maker's."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    source: str = ""
    measured: bool = False

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which compute bounds, and below which bandwidth does."""
        return self.flops / self.bandwidth


def _gpu(name: str, gigabytes: float, gigabytes_s: float, teraflops: float, source: str) -> Device:
    return Device(name, gigabytes * 1e9, gigabytes_s * 1e9, teraflops * 1e12, source)


GPUS = (
    # name, GB, GB/s, dense BF16 TFLOP/s (half of the figure "with sparsity" where the sheet gives only that), sheet
    _gpu("H100-SXM", 80, 3350, 989.5, _HOPPER),
    _gpu("H200-SXM", 141, 4800, 989.5, "https://www.nvidia.com/en-us/data-center/h200/"),
    # one of eight of a DGX B200: 1440 GB, 64 TB/s; HGX B200: 36 PFLOP/s BF16 with sparsity
    _gpu("B200", 180, 8000, 2250, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    _gpu("A100-40GB", 40, 1555, 312, _AMPERE),
    _gpu("A100-80GB", 80, 2039, 312, _AMPERE),
    _gpu("L40S", 48, 864, 362.05, "https://www.nvidia.com/en-us/data-center/l40s/"),
    _gpu("L4", 24, 300, 121, "https://www.nvidia.com/en-us/data-center/l4/"),
    _gpu("RTX-4090", 24, 1008, 165.2, _ADA),
    _gpu("MI300X", 192, 5300, 1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
)


def find_device(name: str | None) -> Device:
    """A GPU of the table, as it is named there or close; None or "cpu" for this machine, measured in about a second.

    Raises:
        UsageError: the table has no such device; the message lists it.
    """
    if name is None or name.lower() in ("cpu", "this"):
        return this_machine()
    plain = _plain(name)
    for device in GPUS:
        if plain == _plain(device.name):
            return device
    near = [d for d in GPUS if _plain(d.name).startswith(plain) or plain.startswith(_plain(d.name))]
    if len(near) == 1:
        return near[0]
    known = [d.name for d in GPUS]
    close = [d.name for d in near] or difflib.get_close_matches(name.upper(), known, 1)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UsageError(f"device {name!r} is not known{hint}; use cpu or one of {', '.join(known)}")


def this_machine() -> Device:
    """This machine's memory, and what a read of 256 MB and a bfloat16 matmul reach on it now."""
    threads = torch.get_num_threads()
    return Device(
        f"this CPU, {threads} thread{'s' * (threads != 1)}", memory(), _read_rate(), _product_rate(), "measured", True
    )


def memory() -> float:
    """Bytes of memory that this machine has."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    info = Path("/proc/meminfo")
    found = re.search(r"MemTotal:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return float(found.group(1)) * 1024 if found else float("nan")


def _read_rate(size: int = 1 << 26, seconds: float = 0.5) -> float:
    matrix, vector = torch.ones(size // 8192, 8192), torch.ones(8192)
    return 4 * size / _best(lambda: matrix @ vector, seconds)


def _product_rate(n: int = 1024, seconds: float = 0.5) -> float:
    a, b = torch.ones(n, n, dtype=torch.bfloat16), torch.ones(n, n, dtype=torch.bfloat16)
    return 2 * n**3 / _best(lambda: a @ b, seconds)


def _best(call: Callable[[], object], seconds: float) -> float:
    """The quickest of as many calls as fit into the time, at least two."""
    end, best, runs = time.perf_counter() + seconds, float("inf"), 0
    while runs < 2 or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best, runs = min(best, time.perf_counter() - began), runs + 1
    return best


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|amd|instinct|geforce", "", name.lower())

"""The instruction sets of CPUs that the native kernel is compiled for, and those that this CPU runs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

INSTRUCTION_SETS = ("generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon")
"""On x86 each has what those before it have, but that ``avx2_vnni`` is for CPUs without AVX-512; ``neon`` is what every
64-bit ARM has."""
AVX2_VNNI = "avx2_vnni"
"""AVX2 with AVX-VNNI, which adds up four products of bytes: Intel's CPUs for laptops and desktops since 2021."""
_ASKS_TORCH = {"avx512_vnni": "_is_vnni_supported", "amx_bf16": "_init_amx"}
"""The second asks the system for AMX's tiles too, which a process may be refused."""


def cpu_has_tiles() -> bool:
    """Whether the CPU has AMX, as far as torch knows; a system may keep it from a process."""
    found: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return found


def cpu_has_avx_vnni() -> bool:
    """Whether the CPU has AVX-VNNI, as far as torch knows."""
    asked: Callable[[], Mapping[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
    return asked is not None and bool(asked().get("avx_vnni"))


def isas_here() -> list[str]:
    """The instruction sets that this CPU runs, weakest first."""
    found = ["generic"]
    if platform.machine().lower() in ("aarch64", "arm64") and sys.maxsize > 2**32:
        return [*found, "neon"]
    for isa in INSTRUCTION_SETS[1:-1]:  # torch finds none of them on another kind of machine
        if isa == AVX2_VNNI:
            found += [isa] * ("avx2" in found and cpu_has_avx_vnni())
            continue
        name = _ASKS_TORCH.get(isa, f"_is_{isa}_supported")
        if not getattr(torch.cpu, name, lambda: False)():  # a virtual CPU may hide one in the middle
            break
        found.append(isa)
    return found

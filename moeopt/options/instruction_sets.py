"""The instruction sets of CPUs that the native kernel is compiled for, and those that this CPU runs."""

from __future__ import annotations

import torch

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
"""Weakest first; on x86, each has what those before it have."""
_TORCH_NAMES = {"avx512_vnni": "vnni"}


def isas_here() -> list[str]:
    """The instruction sets that this CPU runs, weakest first."""
    found = ["generic"]
    for isa in INSTRUCTION_SETS[1:]:  # torch finds none of them on another kind of machine
        name = _TORCH_NAMES.get(isa, isa)
        if not getattr(torch.cpu, f"_is_{name}_supported", lambda: False)():  # a virtual CPU may hide one in the middle
            break
        found.append(isa)
    return found

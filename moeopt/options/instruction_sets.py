"""The instruction sets of CPUs that the native kernel is compiled for, and those that this CPU runs."""

from __future__ import annotations

import torch

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")
"""Weakest first; on x86, each has what those before it have."""


def isas_here() -> list[str]:
    """The instruction sets that this CPU runs, weakest first."""
    found = ["generic"]
    for isa in INSTRUCTION_SETS[1:]:  # torch finds none of them on another kind of machine
        needed = (isa, "vnni") if isa == "avx512_bf16" else (isa,)  # CPUs have both or none; a virtual one may hide it
        if not all(getattr(torch.cpu, f"_is_{one}_supported", lambda: False)() for one in needed):
            break
        found.append(isa)
    return found

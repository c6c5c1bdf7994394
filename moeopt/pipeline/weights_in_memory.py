"""Where a model's weights are: experts and the rest, in memory of the process's own or mapped from files."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from moeopt.ir.weight_refs import expert_paths, tensor_at
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.rewrite.live_codes import PREFIX
from moeopt.sizes import in_megabytes

MAPS = Path("/proc/self/maps")


def weights_note(model: nn.Module, outcome: PipelineResult) -> str:
    """One sentence: bytes of codes, of experts that are floats and of the rest; how much of each is mapped from files.

    A storage that several tensors share counts once; pages of a mapped file are read when used, and can be given back.
    """
    experts = {
        id(tensor_at(model.get_submodule(path), name))
        for path, rewrite in outcome.rewrites.items()
        for found in rewrite.found
        for name in expert_paths(found.experts)
    }
    mapped, own, seen = defaultdict[str, int](int), defaultdict[str, int](int), set[int]()
    files = _mapped_ranges()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or tensor.untyped_storage()._cdata in seen:
            continue
        seen.add(tensor.untyped_storage()._cdata)
        kind = "experts as floats" if id(tensor) in experts else "the rest"
        kind = "experts as codes" if PREFIX in name else kind
        place = mapped if _inside(files, tensor) else own
        place[kind] += tensor.untyped_storage().nbytes()
    parts = [k for k in ("experts as codes", "experts as floats", "the rest") if own[k] or mapped[k]]
    told = ", ".join(f"{part} {in_megabytes(own[part])}{_also(mapped[part])}" for part in parts)
    return f"weights in memory: {told}; {in_megabytes(sum(own.values()))} of the process's own"


def _also(mapped: int) -> str:
    return f" and {in_megabytes(mapped)} mapped from files" if mapped else ""


def _mapped_ranges() -> list[tuple[int, int]]:
    """Addresses of this process that are files; [] where the system does not tell."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for words in (line.split(maxsplit=5) for line in lines):
        if len(words) == 6 and words[4] != "0" and words[5].startswith("/"):
            first, last = (int(n, 16) for n in words[0].split("-"))
            found.append((first, last))
    return sorted(found)


def _inside(ranges: list[tuple[int, int]], tensor: torch.Tensor) -> bool:
    if tensor.device.type != "cpu" or not tensor.numel():
        return False
    address = tensor.data_ptr()
    at = bisect_right(ranges, (address, 1 << 64)) - 1
    return at >= 0 and ranges[at][0] <= address < ranges[at][1]

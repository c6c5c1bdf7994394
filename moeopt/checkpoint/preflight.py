"""What streaming a checkpoint will take, compared with what this machine has, before anything is read."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moeopt.backends import registry
from moeopt.bundle.destination import check_destination, check_name
from moeopt.checkpoint.alike_layers import AlikeLayers
from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.expanded import ExpandedDirectory
from moeopt.checkpoint.journal import folder_of
from moeopt.checkpoint.scratch import scratch_place
from moeopt.checkpoint.structure import Structure
from moeopt.errors import UsageError
from moeopt.options import Options
from moeopt.options.quant_plan import CHECKPOINT, QuantPlan
from moeopt.sizes import in_words

LIBRARIES = 200_000_000
"""Bytes that tracing a model and verifying its blocks take beside weights."""


@dataclass(frozen=True)
class Preflight:
    """Bytes that are needed, and those that are free; ``memory_free`` is None where the system does not tell."""

    weights: int
    layer: int
    layers: int
    made_anew: int
    memory_needed: int
    memory_free: int | None
    disk_needed: int
    disk_free: int | None

    def __str__(self) -> str:
        free = "unknown" if self.memory_free is None else in_words(self.memory_free)
        disk = f", disk needed {in_words(self.disk_needed)}" if self.disk_needed else ""
        disk += f", free {in_words(self.disk_free)}" if self.disk_free is not None else ""
        return (
            f"streaming {in_words(self.weights)} of weights in {self.layers} layers of at most "
            f"{in_words(self.layer)}: memory needed {in_words(self.memory_needed)}, free {free}{disk}"
        )


def check_out(source: Path, target: Path, options: Options, overwrite: bool) -> None:
    """``UsageError`` where no bundle of the directory ``source`` can be written to ``target``."""
    for path in (target, folder_of(target)):
        check_name(path)
    if target.resolve() == source.resolve():
        raise UsageError(f"{target} is the model's own directory: give a new one")
    check_destination(target, options.verify != "off", overwrite)


def preflight(
    directory: CheckpointDirectory,
    structure: Structure,
    out: Path | None,
    begun: int = 0,
    kinds: AlikeLayers | None = None,
    backend: str = "torch",
    options: Options | None = None,
) -> Preflight:
    """The figures for a run that writes its weights to ``out``, or keeps what is made anew in memory.

    Args:
        begun: bytes that an earlier run wrote there.
        kinds: given, only the first layer of each kind is held.
        backend: an engine's graph has a weights file of its own, of which the bundle has a copy (onnx reads no file of
            two names), and its blocks are built one by one in memory.
        options: with ``quantize``, the rounded weights are held in memory, half of the model or less; the codes of the
            checkpoint itself, and the floats that they stand for, are pages of scratch files.

    Raises:
        UsageError: memory or disk do not suffice; the message says what is needed, what is free and the way out.
    """
    largest = max(structure.layer_bytes, structure.rest_bytes)
    anew = made_anew(directory, structure)
    scratch = out is None and kinds is None and isinstance(directory, ExpandedDirectory)
    held = 0 if out is not None or scratch else anew if kinds is None else min(anew, kinds.bytes)
    held += (
        structure.bytes // 2
        if options is not None and options.quantize not in (None, QuantPlan(default=CHECKPOINT))
        else 0
    )
    copies, layers = registry.get(backend).streamed_takes
    disk = 0 if out is None else max(int(copies * structure.bytes * 1.01) + (1 << 20) - begun, 0)
    place = scratch_place() / "moeopt" if scratch else out
    found = Preflight(
        structure.bytes, structure.layer_bytes, len(structure.layers), anew, layers * largest + held + LIBRARIES,
        free_memory(), anew if scratch else disk, None if place is None else _free_disk(place),
    )  # fmt: skip
    if found.memory_free is not None and found.memory_needed > found.memory_free:
        wide = layers * largest + LIBRARIES
        way = (
            f"give out= (--out) with a directory that has {in_words(copies * structure.bytes)} free: then "
            f"{in_words(wide)} of memory are enough"
            if held and wide <= found.memory_free
            else f"end other programs, or use a machine with {in_words(found.memory_needed)} free"
        )
        raise UsageError(
            f"{directory.path} needs about {in_words(found.memory_needed)} of memory, and "
            f"{in_words(found.memory_free)} are free ({found}): {way}"
        )
    if scratch:
        _check_scratch(directory.path, anew, found.disk_free)
    elif found.disk_free is not None and disk > found.disk_free:
        raise UsageError(
            f"{out} needs about {in_words(disk)}, and {in_words(found.disk_free)} are free there: free some space, "
            "or give a directory on another disk"
        )
    return found


def _check_scratch(path: Path, needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise UsageError(
            f"{path} stands for {in_words(needed)} of floats, which are kept on the disk while blocks are verified, "
            f"and {in_words(free)} are free in {scratch_place()}: set TMPDIR to a folder on a disk that has room, or "
            "give out= (--out)"
        )


def made_anew(directory: CheckpointDirectory, structure: Structure) -> int:
    """About how many bytes of Parameters are not in the files as they are: experts that are put together, casts."""
    stored = Counter((e.shape, e.dtype) for name, e in directory.items() if directory.lies_there(name))
    total = 0
    for parameter in structure.model.parameters():
        key = tuple(parameter.shape), parameter.dtype
        if stored[key] > 0:
            stored[key] -= 1
        else:
            total += parameter.numel() * parameter.element_size()
    return total


def free_memory() -> int | None:
    """Bytes that this process may still take: of the machine, its control group and its own limits; None: not told."""
    bounds = [_available(), *_group_room(), *_limit_room()]
    known = [b for b in bounds if b is not None]
    return min(known) if known else None


def _available() -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_room() -> list[int | None]:
    """What is left of the limits of the control groups that this process is in (versions 1 and 2)."""
    found: list[int | None] = []
    groups: list[str] = []
    with contextlib.suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    for line in groups:
        number, controllers, name = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            home, limit, used = Path("/sys/fs/cgroup") / name.lstrip("/"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            home = Path("/sys/fs/cgroup/memory") / name.lstrip("/")
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        with contextlib.suppress(OSError, ValueError):
            most = int((home / limit).read_text())
            cached = sum(
                int(row.split()[1])
                for row in (home / "memory.stat").read_text().splitlines()
                if row.split()[0] in ("file", "cache")  # pages of files, which the kernel drops when it needs to
            )
            found.append(max(most - int((home / used).read_text()) + cached, 0))
    return found


def _limit_room() -> list[int | None]:
    try:
        import resource
    except ImportError:
        return []
    rooms: list[int | None] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
        for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY:
                rooms.append(max(most - sizes[used], 0))
    return rooms


def _free_disk(out: Path) -> int:
    parent = next(p for p in out.absolute().parents if p.exists())
    return shutil.disk_usage(parent).free

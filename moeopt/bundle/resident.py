"""Experts on disk, of which as many are in memory as may be: those that tokens choose most.

A bundle's experts are views of its mapped file. Before the experts of a layer run, the router's choice is known: those
of it that are not in memory are read, all asked for at once, and others leave first, so that no more than the budget is
ever held (one call's own choice excepted). What leaves is what the least tokens chose lately. An expert that leaves is
unmapped and dropped from the kernel's cache of the file, so the budget is one on memory and not on this process's view
of it; :meth:`ResidentExperts.measured` asks the kernel (mincore) what of the experts really is in memory.

Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeopt.errors import UsageError

_PAGE = mmap.PAGESIZE
_WILLNEED, _PAGEOUT, _POPULATE_READ = 3, 21, 22
"""Linux's numbers of what madvise is asked for: https://man7.org/linux/man-pages/man2/madvise.2.html"""
DECAY = 0.98
"""What of an expert's load is left after each call of its layer."""


@dataclass(frozen=True)
class Residency:
    """What keeping experts on disk did since the engine was loaded.

    Attributes:
        budget, resident: bytes that may be in memory, and that are kept there.
        calls, tokens: of the model; tokens are counted at its first layer with experts.
        hit_rate: share of the chosen experts that were in memory; None before the first call.
        bytes_read: in all.
        seconds_lost: waiting for reads.
        over: the most bytes by which one call's own choice exceeded the budget.
        enforced: how the budget is kept, in words.
    """

    budget: int
    resident: int
    calls: int
    tokens: int
    hit_rate: float | None
    bytes_read: int
    seconds_lost: float
    over: int
    enforced: str

    @property
    def bytes_read_per_token(self) -> float:
        return self.bytes_read / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        rate = "-" if self.hit_rate is None else f"{self.hit_rate:.1%}"
        return (
            f"{self.resident / 1e6:.1f} of {self.budget / 1e6:.1f} MB of experts in memory; hit rate {rate}, "
            f"{self.bytes_read_per_token / 1e6:.2f} MB read a token, {self.seconds_lost:.2f} s lost in {self.calls} "
            f"calls; {self.enforced}"
        )


@dataclass
class _Expert:
    """Where an expert's weights lie: (address, bytes) of each piece; how much it was chosen lately."""

    pieces: list[tuple[int, int]]
    bytes: int
    load: float = 0.0
    here: bool = False


class ResidentExperts:
    """The experts of a loaded graph under a budget of memory.

    Args:
        budget: bytes.
        file: the safetensors file that the weights are mapped from.
        layers: for each layer with experts, its matrices as the op takes them (stacked, or one for each expert), and E.

    Raises:
        UsageError: the budget does not hold the largest expert, or this system cannot drop pages.
    """

    def __init__(self, budget: int, file: Path, layers: Sequence[tuple[list[Tensor], int]]) -> None:
        if not hasattr(os, "posix_fadvise"):
            raise UsageError("resident= drops pages of files, which this system is not asked for here: use Linux")
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.budget = budget
        self._maps = _mappings(file)
        self._layers = [_experts_of(matrices, experts) for matrices, experts in layers]
        largest = max((expert.bytes for layer in self._layers for expert in layer), default=0)
        if budget < largest:
            raise UsageError(
                f"resident={budget} is less than the {largest} bytes of one expert: give that much for each "
                "expert that a token chooses, at least"
            )
        self._file = os.open(file, os.O_RDONLY)
        self._held = self._calls = self._tokens = self._hits = self._asked = self._read = self._over = 0
        self._lost = 0.0
        for layer in self._layers:
            for expert in layer:
                self._drop(expert)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)  # what was written or read in larger pieces, too

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._file)

    def before(self, number: int, ids_TK: Tensor) -> None:
        """Bring the experts of layer ``number`` that ``ids_TK`` names, before they run."""
        with self._lock:
            self._before(self._layers[number], number, ids_TK)

    def _before(self, layer: list[_Expert], number: int, ids_TK: Tensor) -> None:
        counts = torch.bincount(ids_TK.reshape(-1).clamp(-1, len(layer)) + 1, minlength=len(layer) + 2)[1:-1].tolist()
        if number == 0:
            self._calls += 1
            self._tokens += int(ids_TK.shape[0])
        chosen = [expert for expert, count in zip(layer, counts, strict=True) if count]
        for expert, count in zip(layer, counts, strict=True):
            expert.load = expert.load * DECAY + count
        missing = [expert for expert in chosen if not expert.here]
        self._hits += len(chosen) - len(missing)
        self._asked += len(chosen)
        if missing:
            self._make_room(sum(expert.bytes for expert in missing), {id(expert) for expert in chosen})
            self._bring(missing)
        self._over = max(self._over, self._held - self.budget)

    @property
    def residency(self) -> Residency:
        """The figures so far."""
        rate = self._hits / self._asked if self._asked else None
        return Residency(
            self.budget, self._held, self._calls, self._tokens, rate, self._read, self._lost, max(self._over, 0),
            "pages of experts beyond the budget are unmapped and dropped from the file's cache (MADV_PAGEOUT, "
            "POSIX_FADV_DONTNEED)",
        )  # fmt: skip

    def measured(self) -> int:
        """Bytes of all experts that are in memory, as the kernel says it (mincore): mapped here or cached for all."""
        total = 0
        for layer in self._layers:
            for expert in layer:
                for address, size in expert.pieces:
                    begin, length = _inside(address, size)
                    pages = (ctypes.c_ubyte * (length // _PAGE))()
                    self._libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(length), pages)
                    total += sum(page & 1 for page in pages) * _PAGE
        return total

    def _make_room(self, wanted: int, chosen: set[int]) -> None:
        if self._held + wanted <= self.budget:
            return
        here = [e for layer in self._layers for e in layer if e.here and id(e) not in chosen]
        for expert in sorted(here, key=lambda e: e.load):
            self._drop(expert)
            if self._held + wanted <= self.budget:
                return

    def _bring(self, missing: list[_Expert]) -> None:
        started = time.perf_counter()
        for expert in missing:  # all are asked for before any is waited for
            self._advise(expert, _WILLNEED)
        for expert in reversed(missing):  # the one that was asked for last: to wait for it is to wait for all
            self._advise(expert, _POPULATE_READ)
            expert.here = True
            self._held += expert.bytes
            self._read += expert.bytes
        self._lost += time.perf_counter() - started

    def _drop(self, expert: _Expert) -> None:
        for address, size in expert.pieces:
            begin, length = _inside(address, size)
            if length > 0:
                self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _PAGEOUT)
        for address, size in expert.pieces:
            for start, stop, offset in self._maps:
                if start <= address < stop:
                    os.posix_fadvise(self._file, address - start + offset, size, os.POSIX_FADV_DONTNEED)
        if expert.here:
            expert.here = False
            self._held -= expert.bytes

    def _advise(self, expert: _Expert, advice: int) -> None:
        """What an older kernel does not know is left to the op, which reads each page when it comes to it."""
        for address, size in expert.pieces:
            begin = address // _PAGE * _PAGE
            self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), advice)


def _experts_of(matrices: Sequence[Tensor], experts: int) -> list[_Expert]:
    """The pieces of each expert: a row of each stacked matrix, and every E-th of those that are apart."""
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(experts)]
    apart = 0
    for matrix in matrices:
        if matrix.dim() == 3 and matrix.shape[0] == experts:
            size = matrix[0].numel() * matrix.element_size()
            for number in range(experts):
                pieces[number].append((matrix[number].data_ptr(), size))
        else:
            pieces[apart % experts].append((matrix.data_ptr(), matrix.numel() * matrix.element_size()))
            apart += 1
    return [_Expert(found, sum(size for _, size in found)) for found in pieces]


def _inside(address: int, size: int) -> tuple[int, int]:
    """The whole pages in [address, address + size): a page that two experts share stays."""
    begin = -(-address // _PAGE) * _PAGE
    return begin, max((address + size) // _PAGE * _PAGE - begin, 0)


def _mappings(file: Path) -> list[tuple[int, int, int]]:
    """Where this process has the file mapped: addresses [start, stop), and the offset of start in the file."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            parts = line.split(maxsplit=5)
            if len(parts) == 6 and parts[5] == str(file.resolve()):
                start, stop = (int(part, 16) for part in parts[0].split("-"))
                found.append((start, stop, int(parts[2], 16)))
    return found

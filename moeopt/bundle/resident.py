"""Experts on disk, of which as many are in memory as may be: those that tokens choose most.

A bundle's experts are views of its mapped file. Before the experts of a layer run, the router's choice is known: those
of it that are not in memory are asked for one after the other, and for each another one leaves, so that no more than
the budget is ever held (one layer's own choice excepted) and the disk has work while the next one leaves. Then all are
waited for. What leaves is what the least tokens chose lately. An expert that leaves is unmapped and dropped from the
kernel's cache of the file, so the budget is one on memory and not on this process's view of it;
:meth:`ResidentExperts.measured` asks the kernel (mincore) what of the experts really is in memory.

Experts are unmapped with MADV_DONTNEED: MADV_PAGEOUT, which would do both steps in one, does nothing for a process that
may not write to the file, and says so to nobody. Of memory that is no file's it makes zeros, so that it is asked for
pages of the file alone: a matrix that was copied when it was read (``bundle.aligned``) stays.

Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.sizes import in_words

LOG = logging.getLogger("moeopt")
PAGE = mmap.PAGESIZE
_WILLNEED, DONTNEED, _POPULATE_READ = 3, 4, 22
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
        seconds_lost: until what was chosen had been read, and what left for it was dropped.
        over: the most bytes by which one layer's own choice exceeded the budget.
        enforced: how the budget is kept, in words, and what is outside of it.
        kept: what the budget is of: "experts", or all "weights" of an engine of ONNX Runtime, whose calls are counted
            for tokens, and which exceeds the budget by what one call uses.
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
    kept: str = "experts"

    @property
    def bytes_read_per_token(self) -> float:
        return self.bytes_read / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        rate = "-" if self.hit_rate is None else f"{self.hit_rate:.1%}"
        each, beyond = ("token", "one layer's own choice") if self.kept == "experts" else ("call", "what one call uses")
        more = f", at most {in_words(self.over)} above that for {beyond}" if self.over else ""
        return (
            f"{in_words(self.resident)} of {in_words(self.budget)} of {self.kept} in memory; hit rate {rate}, "
            f"{in_words(round(self.bytes_read_per_token))} read a {each}, {self.seconds_lost:.2f} s lost in "
            f"{self.calls} calls{more}; {self.enforced}"
        )


@dataclass
class _Expert:
    """Where an expert's weights lie: (address, bytes) of each piece; how much it was chosen lately."""

    pieces: list[tuple[int, int]]
    bytes: int
    load: float = 0.0


def check_resident(directory: str | os.PathLike[str], where: str) -> None:
    """``UsageError`` where ``resident=`` cannot be had of the bundle in ``directory``, which will run on ``where``.

    Asked before its graph and weights are read.
    """
    if where != "cpu":
        raise UsageError(f"resident= is for engines on the CPU, and {directory} runs on {where}: leave it out")
    check_drops_pages()


def check_drops_pages(*, needs: Sequence[Path] = ()) -> None:
    """``UsageError`` where this system drops no pages of files, or lacks one of the files ``needs``."""
    if not hasattr(os, "posix_fadvise") or not all(path.exists() for path in needs):
        raise UsageError("resident= drops pages of files, which this system is not asked for here: use Linux")


class ResidentExperts:
    """The experts of a loaded graph under a budget of memory.

    Args:
        budget: bytes.
        file: the safetensors file that the weights are mapped from.
        layers: for each layer with experts, the matrices of each expert.
        others: how many layers have experts beside those, which the budget says nothing of.

    Raises:
        UsageError: the budget does not hold the largest expert, no expert lies in pages of the file, or this system
            cannot drop pages.
    """

    def __init__(self, budget: int, file: Path, layers: Sequence[Sequence[Sequence[Tensor]]], others: int = 0) -> None:
        check_drops_pages()
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.budget = budget
        self._maps = mappings(file)
        known: dict[tuple[tuple[int, int], ...], _Expert] = {}  # layers may share their experts
        self._layers = [[self._expert_of(tensors, known) for tensors in layer] for layer in layers]
        largest = max((expert.bytes for expert in known.values()), default=0)
        if not largest:
            raise UsageError(
                f"resident= keeps experts in the pages of {file}, and none of these lie there: they were copied when "
                "they were read, as tensors are that do not begin at a multiple of 64 bytes, or the file is another "
                "one by now; save the bundle again with this version"
            )
        if budget < largest:
            raise UsageError(
                f"resident={budget} is less than the {largest} bytes of one expert: give that much for each "
                "expert that a token chooses, at least"
            )
        self._file = os.open(file, os.O_RDONLY)
        self._here: dict[int, _Expert] = {}
        self._held = self._calls = self._tokens = self._hits = self._asked = self._read = self._over = 0
        self._lost = 0.0
        with contextlib.suppress(OSError):
            os.fsync(self._file)  # what was written just now cannot be dropped before it is on the disk
        for expert in known.values():
            self._drop(expert)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)  # what was written or read in larger pieces, too
        total = sum(expert.bytes for expert in known.values())
        copied = sum(size for pieces in known for _, size in pieces) - total
        self._outside = self._told_outside(file, total, others, copied)

    def _expert_of(self, tensors: Sequence[Tensor], known: dict[tuple[tuple[int, int], ...], _Expert]) -> _Expert:
        """The expert whose matrices these are, one and the same where it was met before: what of it the file has."""
        pieces = tuple((t.data_ptr(), t.numel() * t.element_size()) for t in tensors if t.numel())
        lying = [(at, size) for at, size in pieces if any(a <= at and at + size <= z for a, z, _ in self._maps)]
        return known.setdefault(pieces, _Expert(lying, sum(size for _, size in lying)))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._file)

    def _told_outside(self, file: Path, total: int, others: int, copied: int) -> str:
        """What the budget does not hold for, in words; "" where it holds for all."""
        told = []
        if others:
            told.append(f"the experts of {others} more layers, whose weights the graph does not read as they lie")
        if copied:
            told.append(f"{in_words(copied)} that were copied when they were read, as they lie in the file")
        stays = self.measured() if os.access(file, os.W_OK) else 0  # who may not write is told of no page
        return said_of(self.budget, told, stays if stays > total // 8 else 0, file)

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
        missing = [expert for expert in chosen if id(expert) not in self._here]
        self._hits += len(chosen) - len(missing)
        self._asked += len(chosen)
        if missing or self._held > self.budget:
            started = time.perf_counter()
            self._bring(missing, {id(expert) for expert in chosen})
            self._lost += time.perf_counter() - started
        self._over = max(self._over, self._held - self.budget)

    @property
    def residency(self) -> Residency:
        """The figures so far."""
        rate = self._hits / self._asked if self._asked else None
        return Residency(
            self.budget, self._held, self._calls, self._tokens, rate, self._read, self._lost, max(self._over, 0),
            "pages of experts beyond the budget are unmapped and dropped from the file's cache (MADV_DONTNEED, "
            f"POSIX_FADV_DONTNEED){self._outside}",
        )  # fmt: skip

    def measured(self) -> int:
        """Bytes of all experts that are in memory, as the kernel says it (mincore): mapped here or cached for all."""
        pieces = {piece for layer in self._layers for expert in layer for piece in expert.pieces}
        return sum(int(in_memory(self._libc, *_inside(address, size)).sum()) * PAGE for address, size in pieces)

    def _bring(self, missing: list[_Expert], chosen: set[int]) -> None:
        """Have ``missing`` in memory, and no more than the budget beside what is ``chosen``."""
        leaving = self._least_chosen(chosen)
        self._make_room(0, leaving)
        for expert in missing:  # all are asked for before any is waited for
            self._make_room(expert.bytes, leaving)
            self._advise(expert, _WILLNEED)
            self._here[id(expert)] = expert
            self._held += expert.bytes
            self._read += expert.bytes
        for expert in reversed(missing):  # the one that was asked for last: to wait for it is to wait for all
            self._advise(expert, _POPULATE_READ)

    def _make_room(self, wanted: int, leaving: Iterator[_Expert]) -> None:
        while self._held + wanted > self.budget and (expert := next(leaving, None)) is not None:
            self._drop(expert)

    def _least_chosen(self, but: set[int]) -> Iterator[_Expert]:
        """What is in memory ``but`` for some, in the order in which it may leave: of equal ones what came first."""
        here = [(expert.load, turn, key) for turn, (key, expert) in enumerate(self._here.items()) if key not in but]
        heapq.heapify(here)
        while here:
            yield self._here[heapq.heappop(here)[2]]

    def _drop(self, expert: _Expert) -> None:
        for address, size in expert.pieces:
            begin, length = _inside(address, size)
            if length > 0:
                self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), DONTNEED)
        for address, size in expert.pieces:
            for start, stop, offset in self._maps:
                if start <= address < stop:
                    os.posix_fadvise(self._file, address - start + offset, size, os.POSIX_FADV_DONTNEED)
        if self._here.pop(id(expert), None) is not None:
            self._held -= expert.bytes

    def _advise(self, expert: _Expert, advice: int) -> None:
        """What an older kernel does not know is left to the op, which reads each page when it comes to it."""
        for address, size in expert.pieces:
            begin = address // PAGE * PAGE
            self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), advice)


def said_of(budget: int, told: list[str], stays: int, file: Path) -> str:
    """What a budget does not hold for, in words, which the log warns of; "" where it holds for all.

    Args:
        stays: bytes of ``file`` that are in memory after all was dropped.
    """
    if stays:
        told.append(
            f"{in_words(stays)} that stay in memory whatever is dropped: {file} lies in memory itself (tmpfs), or "
            "another engine or process has it mapped"
        )
    words = f"; not held to that: {'; '.join(told)}" if told else ""
    if told:
        LOG.warning("resident=%s%s", in_words(budget), words)
    return words


def in_memory(libc: ctypes.CDLL, begin: int, length: int) -> Tensor:
    """Which of some mapped pages are in memory (mincore), 1 each; both numbers are multiples of the page."""
    pages = torch.zeros(length // PAGE, dtype=torch.uint8)
    libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_void_p(pages.data_ptr()))
    return pages & 1


def _inside(address: int, size: int) -> tuple[int, int]:
    """The whole pages in [address, address + size): a page that two experts share stays."""
    begin = -(-address // PAGE) * PAGE
    return begin, max((address + size) // PAGE * PAGE - begin, 0)


def mappings(file: Path) -> list[tuple[int, int, int]]:
    """Where this process has the file mapped: addresses [start, stop), and the offset of start in the file."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            parts = line.split(maxsplit=5)
            if len(parts) == 6 and parts[5] == str(file.resolve()):
                start, stop = (int(part, 16) for part in parts[0].split("-"))
                found.append((start, stop, int(parts[2], 16)))
    return found

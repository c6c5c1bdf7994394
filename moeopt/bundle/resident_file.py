"""A mapped file of weights of which, between calls, no more than a budget is in memory: what calls used most lately.

An engine of ONNX Runtime does not tell which experts it reads. What it has read, the kernel knows: a page that a call
came to is mapped then (``touched_pages``). So after each call all pages are unmapped, for the next call to show what
it comes to, and what the least calls used lately is dropped from the file's cache, with what was read ahead of it. A
page that the process has written to is its own, no page of the file, and stays.

Beside the page that a call came to, the kernel maps the pages around it that the cache has by then, which says nothing
of the call. It does so within one window of addresses ("fault-around"), and never in a window that no call came to. So
windows are what stays or goes; pieces of the file, which begin anywhere in a window, would count their neighbours'.

All weights count, not the experts alone: attention and norms are used by each call, and so are what stays.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from moeopt.bundle.resident import DECAY, DONTNEED, PAGE, Residency, check_drops_pages, in_memory, mappings, said_of
from moeopt.bundle.touched_pages import PAGEMAP, touched_pages
from moeopt.errors import UsageError

WINDOW = 1 << 16
"""Bytes of addresses that stay or go together: those that one page fault maps at most (``fault_around_bytes``)."""


class ResidentFile:
    """The pages of ``file``, which this process has mapped, under a budget of memory.

    Args:
        budget: bytes.

    Raises:
        UsageError: the file is not mapped here, or this system does not tell which pages are, or drops none.
    """

    def __init__(self, budget: int, file: Path) -> None:
        check_drops_pages(needs=[PAGEMAP])
        self._maps = mappings(file)
        if not self._maps:
            raise UsageError(
                f"resident= keeps weights in the pages of {file}, and none of these lie there: the session made copies "
                "of them; leave it out"
            )
        self.budget, self._lock = budget, threading.Lock()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._size = file.stat().st_size
        self._first, self._begins, self._sizes = _windows(self._maps)
        self._in_order = self._begins.argsort(stable=True)
        self._load, self._here = torch.zeros(len(self._sizes)), torch.zeros(len(self._sizes), dtype=torch.bool)
        self._calls = self._asked = self._hits = self._read = self._over = 0
        self._lost = 0.0
        self._file = os.open(file, os.O_RDONLY)
        os.fsync(self._file)  # what was written just now cannot be dropped before it is on the disk
        self._used()
        self._drop()
        stays = self.measured() if os.access(file, os.W_OK) else 0  # who may not write is told of no page
        self._outside = said_of(budget, [], stays if stays > self._size // 8 else 0, file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def after(self) -> None:
        """A call is over: what it used counts, and the budget holds again."""
        with self._lock:
            started = time.perf_counter()
            used = self._used()
            self._load = self._load * DECAY + used
            self._calls += 1
            self._asked += int(used.sum())
            self._hits += int((used & self._here).sum())
            self._read += self._bytes(used & ~self._here)
            self._here |= used
            self._over = max(self._over, self._bytes(self._here) - self.budget)
            here = self._here.nonzero().flatten()
            order = here[self._load[here].argsort(descending=True, stable=True)]
            self._here[order[self._sizes[order].cumsum(0) > self.budget]] = False
            self._drop()
            self._lost += time.perf_counter() - started

    @property
    def residency(self) -> Residency:
        """The figures so far; calls are counted for tokens."""
        return Residency(
            self.budget, self._bytes(self._here), self._calls, self._calls,
            self._hits / self._asked if self._asked else None, self._read, self._lost, max(self._over, 0),
            "between calls, pages of weights beyond the budget are unmapped and dropped from the file's cache "
            f"(MADV_DONTNEED, POSIX_FADV_DONTNEED){self._outside}",
            "weights",
        )  # fmt: skip

    def measured(self) -> int:
        """Bytes of the weights that are in memory, as the kernel says it (mincore): mapped here or cached for all."""
        pages = torch.zeros(-(-self._size // PAGE), dtype=torch.uint8)
        for start, stop, offset in self._maps:  # small tensors share pages, which each has mapped for itself
            pages[offset // PAGE :][: (stop - start) // PAGE] |= in_memory(self._libc, start, stop - start)
        return int(pages.sum()) * PAGE

    def _bytes(self, windows: Tensor) -> int:
        return int(self._sizes[windows].sum())

    def _used(self) -> Tensor:
        """In which windows this process has mapped pages; they are unmapped."""
        used = torch.zeros_like(self._here)
        with PAGEMAP.open("rb", buffering=0) as pagemap:
            for (start, stop, _), first in zip(self._maps, self._first, strict=True):
                for begin, end in touched_pages(pagemap, start, stop):
                    one, last = (first + at // WINDOW - start // WINDOW for at in (begin, end - 1))
                    used[one : last + 1] = True
                    self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONTNEED)
        return used

    def _drop(self) -> None:
        """What lies in no window that stays leaves the file's cache; a page may lie in windows of several mappings."""
        here = self._in_order[self._here[self._in_order]]
        begins = self._begins[here]
        ends = (begins + self._sizes[here]).cummax(0).values if len(here) else begins
        gaps = torch.nn.functional.pad(ends, (1, 0)), torch.nn.functional.pad(begins, (0, 1), value=self._size)
        for begin, end in zip(*(edges.tolist() for edges in gaps), strict=True):
            if begin < end:
                os.posix_fadvise(self._file, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _windows(maps: list[tuple[int, int, int]]) -> tuple[list[int], Tensor, Tensor]:
    """Of each mapping the number of its first window; of each window where it begins in the file, and its bytes."""
    first, begins, sizes = [0], [], []
    for start, stop, offset in maps:
        edges = torch.arange(start // WINDOW, -(-stop // WINDOW) + 1) * WINDOW
        edges.clamp_(start, stop)
        begins.append(edges[:-1] - start + offset)
        sizes.append(edges.diff())
        first.append(first[-1] + len(edges) - 1)
    return first[:-1], torch.cat(begins), torch.cat(sizes)

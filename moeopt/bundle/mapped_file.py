"""A file in memory without a copy of it: tensors that are views of its pages, which are read when they are used.

Pages of a file that nobody wrote to are the kernel's to drop; only what is copied is a process's own ("anonymous")
memory. The mapping is private: a write to such a tensor changes this process's copy of that page and never the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from moeopt.errors import UsageError
from moeopt.patches import no_warnings
from moeopt.sizes import in_words


class MappedFile:
    """The first ``length`` bytes of a file as memory; None means all of it. The file may grow up to there later.

    Attributes:
        writable: whether tensors of it may be written to in place (the file stays as it is). They may not where the
            process's limit of data (``ulimit -d``), which counts what may be written to, leaves no room.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.path = path
        with path.open("rb") as file:
            self.length = os.fstat(file.fileno()).st_size if length is None else length
            self.writable = _room_for(self.length)
            access = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            try:
                self._memory = mmap.mmap(file.fileno(), self.length, flags=flags, prot=access)
            except (OSError, ValueError) as err:
                raise UsageError(
                    f"{path} cannot be mapped into memory ({err}): {in_words(self.length)} of addresses are needed; "
                    "raise the process's limit (ulimit -v), or use a 64-bit Python"
                ) from err
        self._bytes = self._tensor(torch.uint8, self.length, 0)
        self.start = self._bytes.data_ptr()

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
        """The elements from byte ``offset`` on, as a tensor of its own storage."""
        count = 1
        for size in shape:
            count *= size
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset % dtype.itemsize:  # PyTorch's kernels take aligned elements only
            flat = self._tensor(torch.uint8, count * dtype.itemsize, offset).clone().view(dtype)
        else:
            flat = self._tensor(dtype, count, offset)
        return flat.reshape(tuple(shape))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's elements lie in this mapping."""
        return tensor.device.type == "cpu" and 0 <= tensor.data_ptr() - self.start < self.length

    def offset_of(self, tensor: torch.Tensor) -> int:
        """The byte of the file at which a tensor that :meth:`holds` begins."""
        return int(tensor.data_ptr() - self.start)

    def release(self) -> None:
        """Take every page out of this process's memory; the next use reads it again, from the file.

        What a tensor was written in place is lost: for tensors that nobody writes to.
        """
        with contextlib.suppress(AttributeError, OSError):  # a system without the advice drops pages by itself
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _tensor(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        if not count:
            return torch.empty(0, dtype=dtype)
        with no_warnings():  # the mapping is read-only, and nothing writes to these tensors
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)


def _room_for(size: int) -> bool:
    """Whether ``size`` more bytes that may be written to stay below half of the process's limit of data."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return True
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return True
    used = 0
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    return used + size < limit // 2


def give_back() -> None:
    """Return memory that was freed to the system: the C library keeps freed blocks of up to 32 MB for later."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)

"""A safetensors file that is written tensor by tensor while the tensors are made, and read as mapped memory meanwhile.

Room for the header is kept free at the beginning and filled in last, so no tensor has to wait for the others. Every
tensor begins at a multiple of 64 bytes, as PyTorch's own allocations do (``bundle.aligned``): a loaded one is a view of
the file, not a copy. safetensors allows no gaps; what lies between two tensors is a tensor of its own, of bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch

from moeopt.bundle.aligned import ALIGNMENT
from moeopt.bundle.mapped_file import MappedFile
from moeopt.full_disk import told
from moeopt.ir.element_bytes import element_bytes

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.complex64: "C64",
}  # fmt: skip
"""What a safetensors header calls each dtype: https://huggingface.co/docs/safetensors"""
FILL = "moeopt.fill."
_CHUNK = 64 << 20
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}
"""What systems answer whose files have one name each, as on exFAT and some network disks."""


class WeightsFile:
    """A new file of tensors, or one that an earlier process began.

    Args:
        path: where; a file that exists is gone on with.
        capacity: bytes that its tensors will take at most.
        header: bytes that are kept for the header.
    """

    def __init__(self, path: Path, capacity: int, header: int) -> None:
        self.path, self.begin = path, _aligned(8 + header)
        self.end = self.begin
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with told(path):
            os.ftruncate(self._file, self.begin + _aligned(capacity))
        self.mapped = MappedFile(path)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write a tensor at the end; the same tensor as a view of the file.

        Raises:
            OSError: the disk is full, or files may not be as long; what was written before stays.
        """
        offset = self.end
        size = tensor.numel() * tensor.element_size()
        if offset + size > self.mapped.length:
            raise ValueError(f"{self.path} has room for {self.mapped.length} bytes, and {offset + size} are needed")
        with told(self.path):
            write_at(self._file, tensor, offset)
        self.end = _aligned(offset + size)
        return self.mapped.tensor(tensor.dtype, tensor.shape, offset)

    def restore(self, dtype: torch.dtype, shape: list[int], offset: int) -> torch.Tensor:
        """A tensor that an earlier process wrote at ``offset``; the next one is written behind it."""
        found = self.mapped.tensor(dtype, shape, offset)
        self.end = max(self.end, _aligned(offset + found.numel() * found.element_size()))
        return found

    def finish(self, blocks: Mapping[str, torch.Tensor]) -> None:
        """Make it a safetensors file of ``blocks``: those that do not lie in it are written, then the header."""
        with told(self.path):
            self._finish(blocks)

    def _finish(self, blocks: Mapping[str, torch.Tensor]) -> None:
        places: dict[str, tuple[torch.Tensor, int]] = {}
        missing = self._missing(blocks)
        more = sum(_aligned(t.numel() * t.element_size()) for t in missing.values())
        os.ftruncate(self._file, max(self.mapped.length, self.end + more))
        for name, tensor in blocks.items():
            if name not in missing:
                places[name] = tensor, self.mapped.offset_of(tensor)
                continue
            write_at(self._file, tensor, self.end)
            places[name] = tensor, self.end
            self.end = _aligned(self.end + tensor.numel() * tensor.element_size())
        os.ftruncate(self._file, self.end)
        header = header_of(places, self.begin, self.end)
        if len(header) > self.begin - 8:
            self._move_data(_aligned(8 + len(header)))
        room = self.begin - 8
        os.pwrite(self._file, room.to_bytes(8, "little") + header.ljust(room), 0)
        os.fsync(self._file)

    def settle(self) -> None:
        """What was written is on the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Nothing more is written; tensors of it stay."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _missing(self, blocks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The blocks that do not lie in the file, or share bytes with one that does."""
        missing, at = {}, 0
        lying = {n: t for n, t in blocks.items() if t.numel() and t.is_contiguous() and self.mapped.holds(t)}
        for name, tensor in sorted(lying.items(), key=lambda item: self.mapped.offset_of(item[1])):
            offset = self.mapped.offset_of(tensor)
            if offset < at:
                missing[name] = tensor
            at = max(at, offset + tensor.numel() * tensor.element_size())
        return missing | {name: tensor for name, tensor in blocks.items() if name not in lying}

    def _move_data(self, begin: int) -> None:
        """Make more room for the header, in a new file: the tensors that are mapped stay where they are."""
        aside = self.path.with_name(self.path.name + ".wider")
        file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        for at in range(self.begin, self.end, _CHUNK):
            _write(file, os.pread(self._file, min(_CHUNK, self.end - at), at), at - self.begin + begin)
        os.replace(aside, self.path)
        os.close(self._file)
        self._file, self.end, self.begin = file, self.end - self.begin + begin, begin


_becoming: ContextVar[WeightsFile | None] = ContextVar("moeopt_weights_file", default=None)


@contextlib.contextmanager
def becomes_the_bundles(file: WeightsFile | None) -> Iterator[None]:
    """While open, a bundle that is saved takes ``file`` for its weights and copies nothing that lies in it."""
    token = _becoming.set(file)
    try:
        yield
    finally:
        _becoming.reset(token)


def is_becoming_one() -> bool:
    """Whether the weights of the bundle that is saved next are on its disk already."""
    return _becoming.get() is not None


def save_weights(blocks: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write ``blocks`` to ``path`` as safetensors; takes no memory of their size."""
    begun = _becoming.get()
    if begun is not None:
        begun.finish(blocks)
        _second_name(begun.path, path)  # the first one stays until the bundle is complete
        return
    size = sum(_aligned(t.numel() * t.element_size()) for t in blocks.values())
    file = WeightsFile(path, size, len(header_of({n: (t, 0) for n, t in blocks.items()}, 0, 0)) + 160 * len(blocks))
    try:
        file.finish(blocks)
    finally:
        file.close()


def _second_name(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError as err:
        if err.errno not in _NO_LINKS:
            raise
        with told(name):
            shutil.copyfile(path, name)


def header_of(places: Mapping[str, tuple[torch.Tensor, int]], begin: int, end: int) -> bytes:
    """The JSON header of tensors that lie at offsets of a file whose data are [begin, end)."""
    entries: dict[str, dict[str, object]] = {}
    at = begin

    def entry(name: str, dtype: str, shape: list[int], start: int, stop: int) -> None:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start - begin, stop - begin]}

    for name, (tensor, offset) in sorted(places.items(), key=lambda item: (item[1][1], item[0])):
        if offset > at:
            entry(f"{FILL}{len(entries)}", "U8", [offset - at], at, offset)
        size = tensor.numel() * tensor.element_size()
        dtype = DTYPE_NAMES.get(tensor.dtype)
        shape = [size] if dtype is None else list(tensor.shape)  # read as bytes, and seen as its dtype by the bundle
        at = max(at, offset)
        entry(name, dtype or "U8", shape, at, at + size)
        at += size
    if end > at:
        entry(f"{FILL}{len(entries)}", "U8", [end - at], at, end)
    return json.dumps(entries, separators=(",", ":")).encode()


def write_at(file: int, tensor: torch.Tensor, offset: int) -> None:
    """Write a tensor's elements in row-major order, from any device."""
    if tensor.numel():
        _write(file, element_bytes(tensor.cpu()).numpy().data, offset)


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    for at in range(0, len(view), _CHUNK):
        part = view[at : at + _CHUNK]
        while part:
            done = os.pwrite(file, part, offset + at)
            part, at = part[done:], at + done


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

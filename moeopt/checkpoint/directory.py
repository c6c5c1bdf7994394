"""A directory of safetensors files: what tensors it holds, and each of them as mapped memory when it is asked for.

Everything that can be wrong with the files is found from the index and the headers, before a weight is read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moeopt.bundle.mapped_file import MappedFile
from moeopt.bundle.weights_file import DTYPE_NAMES
from moeopt.errors import CheckpointError
from moeopt.hub_cache import name_of
from moeopt.listed import listed
from moeopt.published.headers import INDEX, StoredTensor, files_of, interrupted, read_header, stat_of

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"F8_E8M0": torch.float8_e8m0fnu}
_FETCH = "fetch the file again"


@dataclass(frozen=True)
class CheckpointTensor:
    """Where a tensor lies, and what it is."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


class CheckpointDirectory(Mapping[str, CheckpointTensor]):
    """The tensors of a directory by name; :meth:`tensor` reads one.

    Args:
        path: a directory with ``model.safetensors``, with ``model.safetensors.index.json`` and the files that the index
            names, or with other ``*.safetensors`` files, of which then all are read.

    Raises:
        CheckpointError: a file is missing, damaged or shorter than its header says, the index and the files disagree,
            or a tensor has a dtype that PyTorch does not have. The message names the file and the way out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[Path, MappedFile] = {}
        self._stats: dict[Path, os.stat_result] = {}
        self._entries: dict[str, CheckpointTensor] = {}
        files, where = files_of(path)
        self._check_there(files, where)
        for file in files:
            self._stats[file] = stat_of(file)  # before its header: a file that changes after this is refused
            for name, stored in read_header(file).items():
                if where is None or where.get(name) == file.name:
                    self._add(name, file, stored)
        absent = [name for name in where or () if name not in self._entries]
        if absent:
            raise CheckpointError(
                f"{path / INDEX} says that {absent[0]!r} is in {(where or {})[absent[0]]}, and that file has no such "
                f"tensor ({len(absent)} of {len(where or {})} are missing so): the index and the files are of two "
                "versions; fetch both again"
            )

    def __getitem__(self, name: str) -> CheckpointTensor:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def files(self) -> list[Path]:
        """The files that hold its tensors."""
        return sorted({entry.file for entry in self._entries.values()})

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self._entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as a view of its file: nothing is read before it is used, and nothing is copied."""
        entry = self._entries[name]
        if entry.file not in self._mapped:
            self._mapped[entry.file] = MappedFile(entry.file)
            self.check_unchanged([entry.file])
        return self._mapped[entry.file].tensor(entry.dtype, entry.shape, entry.start)

    def lies_there(self, name: str) -> bool:
        """Whether the tensor's bytes are those of its file; False where they are made when it is read."""
        del name
        return True

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a view of one of its files."""
        return any(mapped.holds(tensor) for mapped in self._mapped.values())

    def release(self) -> None:
        """Take the pages of its files out of this process's memory; the next use reads them again."""
        for mapped in self._mapped.values():
            mapped.release()

    def check_unchanged(self, files: list[Path] | None = None) -> None:
        """``CheckpointError`` where one of the files (None: of all) is not as it was when its header was read."""
        for file in sorted(self._stats) if files is None else files:
            now = file.stat() if file.is_file() else None
            if now is None or _version(now) != _version(self._stats[file]):
                raise CheckpointError(
                    f"{file} {'was removed' if now is None else 'was written to'} while the model was read, so that "
                    "its weights may be of two versions: wait until nothing writes to the directory, and start again"
                )

    def identity(self) -> str:
        """A digest of what the directory holds: names, places, and the size and time of change of each file."""
        stats = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in sorted(self._stats.items())]
        rows = [(e.name, e.file.name, str(e.dtype), e.shape, e.start) for e in self._entries.values()]
        return hashlib.sha256(repr((stats, sorted(rows))).encode()).hexdigest()

    def _check_there(self, files: list[Path], where: Mapping[str, str] | None) -> None:
        if not files and any(self.path.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{self.path} holds its weights as pickles (pytorch_model.bin), which are read whole and not "
                "streamed: load the model with transformers and give it, or save it once with save_pretrained(), "
                "which writes safetensors"
            )
        if not files:
            name = name_of(self.path)
            way = f"`hf download {name}` brings the weights" if name else "give the directory of the weights"
            raise CheckpointError(f"{self.path} has no *.safetensors file: {interrupted(self.path) or way}")
        absent = [file.name for file in files if where is not None and not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{self.path} lacks {listed(absent, 1)} of the {len(files)} files that {INDEX} names: "
                f"{interrupted(self.path) or _FETCH}"
            )

    def _add(self, name: str, file: Path, stored: StoredTensor) -> None:
        dtype, size = DTYPES.get(stored.dtype), stored.stop - stored.start
        if dtype is None:
            raise CheckpointError(
                f"{file}: the tensor {name!r} is of dtype {stored.dtype}, which is not one that is read here "
                f"({', '.join(DTYPES)}): convert the checkpoint first"
            )
        if math.prod(stored.shape) * dtype.itemsize != size:
            raise CheckpointError(
                f"{file} is damaged: the tensor {name!r} has {size} bytes, and {stored.dtype} {list(stored.shape)} "
                f"takes {math.prod(stored.shape) * dtype.itemsize}; {_FETCH}"
            )
        if name in self._entries:
            raise CheckpointError(
                f"the tensor {name!r} is in {self._entries[name].file.name} and in {file.name} of {self.path}: keep "
                f"one of the two, or add {INDEX}, which says which holds"
            )
        self._entries[name] = CheckpointTensor(name, file, dtype, stored.shape, stored.start, size)


def _version(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns

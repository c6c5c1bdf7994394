"""The tensors of a directory's safetensors files by name: each is mapped when it is asked for, and none is copied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moeopt.errors import CheckpointError
from moeopt.published.headers import files_of
from moeopt.value_types import PyObject

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class TensorFiles(Protocol):
    """Tensors by name, of which sizes are known without a read."""

    def __iter__(self) -> Iterator[str]:
        """The names."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its sizes."""

    def dtype(self, name: str) -> torch.dtype | None:
        """Its dtype; None for one that this torch does not have."""

    def tensor(self, name: str) -> Tensor:
        """Its values, as mapped memory."""


_instead: ContextVar[Mapping[str, str]] = ContextVar("moeopt_read_instead", default={})  # noqa: B039  not written to


@contextlib.contextmanager
def read_instead(names: Mapping[str, str]) -> Iterator[None]:
    """While open, directories are made in which a tensor of ``names`` has the values of the one that it gives."""
    token = _instead.set(names)
    try:
        yield
    finally:
        _instead.reset(token)


class SafetensorsDirectory:
    """:class:`TensorFiles` of the files that hold a directory's tensors; others beside them are left alone.

    Raises:
        CheckpointError: a file or the index is damaged; the message names it.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self._places: dict[str, Any] = {}
        self._known: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
        files, where = files_of(path)
        for file in files:
            try:
                opened: PyObject = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as err:
                raise CheckpointError(f"{file} is damaged ({err}): fetch the file again") from err
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                if where is None or where.get(name) == file.name:
                    self._places[name] = opened
        self._instead = {name: other for name, other in _instead.get().items() if other in self._places}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[0]

    def dtype(self, name: str) -> torch.dtype | None:
        return self._entry(name)[1]

    def tensor(self, name: str) -> Tensor:
        stored = self._instead.get(name, name)
        found: Tensor = self._places[stored].get_tensor(stored)
        return found

    def _entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        if name not in self._known:
            part = self._places[name].get_slice(name)
            self._known[name] = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
        return self._known[name]

"""Room for codes and for the floats that they stand for: memory, or pages of files for models larger than memory."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

_folder: ContextVar[Path | None] = ContextVar("moeopt_codes_in", default=None)


@contextlib.contextmanager
def codes_in(folder: Path | None) -> Iterator[None]:
    """While open, :func:`room_for` gives pages of files in ``folder``, which the kernel may write out and drop."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def room_for(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled. A file that it lies in has no name any more: its space goes with the tensor."""
    folder, size = _folder.get(), math.prod(shape) * dtype.itemsize
    if folder is None or not size:
        return torch.empty(tuple(shape), dtype=dtype)
    handle, name = tempfile.mkstemp(prefix="codes-", dir=folder)
    os.close(handle)
    flat = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    with contextlib.suppress(OSError):  # Windows keeps the name while the file is mapped
        os.unlink(name)
    return flat.view(dtype).reshape(tuple(shape))

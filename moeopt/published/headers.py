"""What a checkpoint's files say of themselves: the JSON header of each safetensors file, and no weight.

A safetensors file is 8 bytes (length of the header, little-endian), the header (a JSON object: tensor name ->
dtype, shape, data_offsets), and the data. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeopt.errors import CheckpointError
from moeopt.value_types import PyObject

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version "
"""How a pointer of Git LFS begins; as a length it would be 2 * 10**18 bytes."""
LARGEST_HEADER = 100_000_000
"""The limit of the safetensors library itself."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: its dtype as safetensors names it, and the bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """The weights of a directory as they are stored: bytes of data, and how many elements of each dtype."""

    files: int
    tensors: int
    bytes: int
    elements: dict[str, int]


def files_of(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files that hold a directory's tensors, and the file of each tensor where an index says it.

    Other files may lie beside them, of an earlier version or another library, with tensors of the same names. A file
    that an index names may be absent.

    Raises:
        CheckpointError: the index is damaged.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], None
    if (directory / INDEX).is_file():
        where = read_index(directory / INDEX)
        return [directory / name for name in sorted(set(where.values()))], where
    return sorted(directory.glob("*.safetensors")), None


def stored_weights(directory: Path) -> Stored | None:
    """Headers of the files that hold a directory's tensors; None where there are none.

    Raises:
        CheckpointError: a header is damaged, or a file is shorter than its header says.
    """
    found, where = files_of(directory)
    files = [path for path in found if path.exists()]
    if not files:
        return None
    elements: Counter[str] = Counter()
    tensors = total = 0
    for path in files:
        for name, entry in read_header(path).items():
            if where is not None and where.get(name) != path.name:
                continue
            elements[entry.dtype] += math.prod(entry.shape)
            total += entry.stop - entry.start
            tensors += 1
    return Stored(len(files), tensors, total, dict(elements))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; no weight is read.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter than its header says.
    """
    size = stat_of(path).st_size
    try:
        file = path.open("rb")
    except OSError as err:
        raise unreadable(path, err) from err
    with file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if begin == _POINTER:
            raise CheckpointError(
                f"{path} is a pointer of Git LFS, which stands for the file: `git lfs pull` in its directory brings it"
            )
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise _damaged(path, f"its header should have {length} bytes, and the whole file has {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as err:
        raise _damaged(path, f"its header is not JSON ({err})") from err
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table of tensors")
    ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and _offsets(e)]
    if ends and 8 + length + max(ends) > size:
        raise _damaged(path, f"the data should end at byte {8 + length + max(ends)}, and the file has {size}")
    found = {name: _entry(path, name, e, 8 + length) for name, e in header.items() if name != "__metadata__"}
    before, end = "", 0
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start < end and stored.stop > stored.start:
            raise _damaged(path, f"the tensors {before!r} and {name!r} share bytes")
        before, end = (name, stored.stop) if stored.stop > end else (before, end)
    return found


def interrupted(path: Path) -> str:
    """What to do about a download to ``path`` that did not end, as huggingface_hub leaves it; "" where none is seen."""
    places = [path, path / ".cache" / "huggingface" / "download"]
    if path.parent.name == "snapshots":  # of a cache; any other folder's neighbours are not its own
        places.append(path.parent.parent / "blobs")
    left = next((file for place in places for file in sorted(place.glob("*.incomplete"))), None)
    return "" if left is None else f"a download was interrupted ({left}); `hf download`, called again, goes on with it"


def absent_files(path: Path) -> list[str]:
    """The files that the index of a directory names and that are not there; [] where it has no index that is whole."""
    if (path / SINGLE).is_file():
        return []
    with contextlib.suppress(CheckpointError):
        return sorted(name for name in {*read_index(path / INDEX).values()} if not (path / name).is_file())
    return []


def read_index(path: Path) -> dict[str, str]:
    """The name of the file that each tensor is in, as an index says.

    Raises:
        CheckpointError: it is not there, damaged, or names what is no file beside it.
    """
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        good = all(isinstance(k, str) and isinstance(v, str) and Path(v).name == v for k, v in where.items())
    except OSError as err:
        raise unreadable(path, err) from err
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise CheckpointError(
            f"{path} is damaged ({type(err).__name__}: {str(err)[:200]}); fetch the file again"
        ) from err
    if not good:
        raise CheckpointError(
            f"{path} names files outside the directory, or something that is no file; fetch the file again"
        )
    return dict(where)


def _once(pairs: list[tuple[str, PyObject]]) -> dict[str, PyObject]:
    """A JSON object; ``ValueError`` where it says two things of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"it has two entries {name!r}")
    return found


def stat_of(path: Path) -> os.stat_result:
    """What the system says of a file of a checkpoint.

    Raises:
        CheckpointError: it is a folder, or a pipe, which to open would mean to wait; or a link that leads nowhere.
    """
    try:
        found = path.stat()
    except OSError as err:
        raise unreadable(path, err) from err
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no file: put the checkpoint's file there, or remove it")
    return found


def unreadable(path: Path, err: OSError) -> CheckpointError:
    """The error for a file that is there, and that the system does not give."""
    way = "give yourself the right to read it" if isinstance(err, PermissionError) else "fetch the file again"
    return CheckpointError(f"{path} cannot be read ({err.strerror or err}): {way}")


def _entry(path: Path, name: str, entry: PyObject, data: int) -> StoredTensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(isinstance(s, int) and s >= 0 for s in shape):
        raise _damaged(path, f"the entry of tensor {name!r} has no shape")
    if not isinstance(entry.get("dtype"), str) or not _offsets(entry):
        raise _damaged(path, f"the entry of tensor {name!r} lacks a dtype or data_offsets")
    begin, end = entry["data_offsets"]
    return StoredTensor(entry["dtype"], tuple(shape), data + begin, data + end)


def _offsets(entry: dict[str, Any]) -> bool:
    pair = entry.get("data_offsets")
    return (
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, int) for p in pair) and 0 <= pair[0] <= pair[1]
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}; fetch the file again, or inspect its config.json alone")

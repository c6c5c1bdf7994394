"""What a streamed run has done so far, in a folder beside its bundle: a killed run goes on where it stopped.

    .NAME.streaming/weights.safetensors    the bundle's weights file, as far as it is written
    .NAME.streaming/journal.jsonl          a line for each Parameter, block and layer that is done

The first line says what is done to what: the checkpoint's files, options and versions. A run that is another one begins
anew. Each weight has its sha256 in the journal and is checked against it before it is used again.

A :class:`Workspace` is such a folder that several processes share: one of them works, the others wait for it and read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils import _pytree as pytree

from moeopt.bundle import aside
from moeopt.bundle.values import DTYPES
from moeopt.bundle.weights_file import WeightsFile
from moeopt.checkpoint.folder_lock import take
from moeopt.errors import CheckpointError, UsageError
from moeopt.find.example_inputs import as_call
from moeopt.full_disk import told
from moeopt.ir.element_bytes import element_bytes
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd
from moeopt.verification.results import BlockCheck

WEIGHTS, JOURNAL = "weights.safetensors", "journal.jsonl"
_SUFFIX, _COMPLETE = ".streaming", {"complete": True}


@dataclass(frozen=True)
class Workspace:
    """A folder in which several processes share one run; it stays. ``wait`` is called while another one works there."""

    folder: Path
    wait: Callable[[], None]


class Journal:
    """The folder of one streamed run to ``out``, held by this process while it is open.

    Args:
        out: where the bundle goes, which the folder lies beside; or the folder that processes share.
        key: what is done to what, as JSON types; a journal with another one is thrown away.
        capacity, header: as in :class:`WeightsFile`.

    Attributes:
        weights: the weights that are done, by Parameter: the value, and the checkpoint's tensors it was made of.
        blocks, layers: verdicts that are done.
        file: where weights are written.
        writes: whether this process works here; else all is done, and it reads.

    Raises:
        UsageError: another process is writing to ``out``, or its folder holds weights that moeopt did not write.
        CheckpointError: what another process has done was damaged since.
    """

    def __init__(self, out: Path | Workspace, key: dict[str, Any], capacity: int, header: int) -> None:
        self.folder = folder_of(out)
        busy, shared = (out.wait, True) if isinstance(out, Workspace) else (self._refuse, False)
        self._lock, self.writes = take(self.folder, busy, lambda: shared and self._complete(key))
        self._bundle = None if isinstance(out, Workspace) else out
        self._journal: TextIO | None = None
        self.weights: dict[str, tuple[torch.Tensor, list[str]]] = {}
        self.blocks: dict[str, BlockCheck] = {}
        self.layers: dict[str, EndToEnd] = {}
        try:
            self._open(key, capacity, header)
        except BaseException:
            self._let_go()  # the same process may try again
            raise

    def _open(self, key: dict[str, Any], capacity: int, header: int) -> None:
        lines = list(_lines(self.folder / JOURNAL))
        if (foreign := _foreign(self.folder, lines)) and self.writes:
            raise UsageError(
                f"{self.folder} holds {foreign!r}, and no {JOURNAL} says that moeopt wrote it: it stays as it is. Give "
                f"another directory, or delete {foreign} where nobody needs it"
            )
        if not lines or lines[0].get("key") != key or not (self.folder / WEIGHTS).is_file() or self._is_a_bundles():
            lines = []
        if self.writes and len(lines) < 2:
            self._begin([{"key": key}])  # first: a kill must leave no weights that look like somebody else's
            (self.folder / WEIGHTS).unlink(missing_ok=True)
        try:
            self.file = WeightsFile(self.folder / WEIGHTS, capacity, header)
        except OSError:  # there is no room, and nothing was done yet
            if self._journal is not None:
                self._journal.close()
                self._remove()
            raise
        restored = list(self._restored(lines[1:]))
        if self.writes:
            self._begin([{"key": key}, *restored])
        elif len(restored) < len(lines) - 2:
            self.file.close()
            raise CheckpointError(f"{self.folder} was damaged since it was written: delete it, and start again")

    @property
    def begun(self) -> bool:
        """Whether an earlier run left something."""
        return bool(self.weights or self.blocks)

    def keep(self, path: str, value: torch.Tensor, sources: list[str]) -> torch.Tensor | None:
        """Write a Parameter, and give the tensor that takes its place; None for one that lies in the file."""
        if self.file.mapped.holds(value) or not self.writes:
            return None
        written = self.file.add(value)
        if path in self.weights and not sources:  # a Parameter that transformers sets twice
            sources = self.weights[path][1]
        self.weights[path] = written, sources
        self._write({
            "weight": path, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape),
            "offset": self.file.mapped.offset_of(written) if written.numel() else 0, "sha256": _digest(written),
            "sources": sources,
        })  # fmt: skip
        return written

    def note_block(self, check: BlockCheck) -> None:
        self.blocks[check.name] = check
        self._write({"block": check.name, "certificate": Certificate([check]).to_json()})

    def note_layer(self, path: str, verdict: EndToEnd) -> None:
        self.layers[path] = verdict
        self._write({"layer": path, "certificate": Certificate([], verdict).to_json()})

    def forget(self) -> None:
        """Take nothing of what was restored; the file is written anew by the process that works here."""
        self.weights, self.blocks, self.layers = {}, {}, {}
        if self.writes:
            self.file.end = self.file.begin
            self._begin(list(_lines(self.folder / JOURNAL))[:1])

    def finish(self) -> None:
        """All is done: who shares the folder may read it, and finds it so after a crash of the machine."""
        self.file.settle()
        self._write(_COMPLETE)
        if self._journal is not None:
            os.fsync(self._journal.fileno())

    def close(self, done: bool) -> None:
        """Let go of the folder; where it is of no more use (``done``), or nothing is done yet, it goes."""
        self.file.close()
        if self._journal is not None:
            with contextlib.suppress(OSError):  # a line that a full disk refused is refused again
                self._journal.close()
        if self.writes and (done or not self.begun):
            self._remove()
        self._let_go()

    def _remove(self) -> None:
        """Still locked: a process that waits for the lock must not have begun to write here."""
        with contextlib.suppress(OSError):  # a folder that holds anything else stays
            own = [path for path in self.folder.iterdir() if is_own(path.name)]
            for path in sorted(own, key=lambda path: path.name == JOURNAL):  # last: it says whose the others are
                path.unlink()
            self.folder.rmdir()

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _begin(self, lines: list[dict[str, Any]]) -> None:
        """The journal with these lines, and nothing that was cut off or is no longer so."""
        if self._journal is not None:
            self._journal.close()
        new = self.folder / f"{JOURNAL}.new"
        with told(new), new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / JOURNAL)
        _settle(self.folder)
        self._journal = (self.folder / JOURNAL).open("a", encoding="utf-8")

    def _write(self, line: dict[str, Any]) -> None:
        if not self.writes or self._journal is None:
            return
        with told(self.folder / JOURNAL):
            self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()

    def _restored(self, lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Take what the lines say, as far as it is still so; those lines."""
        for line in lines:
            if line == _COMPLETE:
                return
            if "weight" in line:
                value = self.file.restore(DTYPES[line["dtype"]], line["shape"], line["offset"])
                if _digest(value) != line["sha256"]:
                    return  # what was written later lies behind it: all of it is done again
                self.weights[line["weight"]] = value, line["sources"]
            else:
                with contextlib.suppress(Exception):  # a verdict of another form is reached again
                    found = Certificate.from_json(line["certificate"])
                    if "block" in line:
                        self.blocks[line["block"]] = found.blocks[0]
                    elif found.end_to_end is not None:
                        self.layers[line["layer"]] = found.end_to_end
            yield line

    def _is_a_bundles(self) -> bool:
        """Whether the weights file has a second name, in a bundle that is whole: what is written to it damages that."""
        if not self.writes:
            return False
        if self._bundle is not None:
            aside.clear_abandoned(self._bundle)  # a bundle that a kill has left half written has it, too
        return (self.folder / WEIGHTS).stat().st_nlink > 1

    def _complete(self, key: dict[str, Any]) -> bool:
        lines = list(_lines(self.folder / JOURNAL))
        there = bool(lines) and (self.folder / WEIGHTS).is_file()
        return there and lines[0].get("key") == key and lines[-1] == _COMPLETE

    def _refuse(self) -> None:
        raise UsageError(
            f"another process is streaming to {self.folder.parent / self.folder.name[1:].removesuffix(_SUFFIX)} (it "
            f"holds {self.folder}): wait for it, or give another directory"
        )


def _settle(folder: Path) -> None:
    """Names of files in ``folder`` that were given or taken are on the disk."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def folder_of(out: Path | Workspace) -> Path:
    """Where a run to ``out`` keeps what it has done."""
    if isinstance(out, Workspace):
        return out.folder
    return out.absolute().parent / f".{out.name}{_SUFFIX}"


def _foreign(folder: Path, lines: list[dict[str, Any]]) -> str:
    """The first file that has a name as a run's own, where no journal tells that a run wrote it; "" where none is."""
    if lines and "key" in lines[0]:
        return ""
    names = sorted(path.name for path in folder.iterdir())
    return next((name for name in names if is_own(name) and name != f"{JOURNAL}.new"), "")


def is_own(name: str) -> bool:
    """Whether a file in a run's folder is one that the run keeps there; codes have names only where they must."""
    return name in (WEIGHTS, JOURNAL, f"{JOURNAL}.new") or name.startswith("codes-")


def bytes_begun(out: Path | Workspace) -> int:
    """Bytes on the disk that an earlier run to ``out`` has written."""
    with contextlib.suppress(OSError, AttributeError):
        return (folder_of(out) / WEIGHTS).stat().st_blocks * 512
    return 0


def digest_of_call(inputs: PyObject) -> str:
    """What tells example inputs from others, by value: verdicts that were reached on some say nothing of others."""
    if inputs is None:
        return ""
    leaves, structure = pytree.tree_flatten(as_call(inputs))
    words = [
        [str(leaf.dtype), list(leaf.shape), _digest(leaf.detach().cpu())]
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_meta
        else repr(leaf)
        for leaf in leaves
    ]
    return hashlib.sha256(repr((str(structure), words)).encode()).hexdigest()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal; the last one may have been cut off."""
    with contextlib.suppress(OSError, ValueError):
        for text in path.read_text(encoding="utf-8").splitlines():
            line: PyObject = json.loads(text)
            if not isinstance(line, dict):
                return
            yield line


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(element_bytes(tensor).numpy().data).hexdigest()

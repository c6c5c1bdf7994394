"""A file without a name that holds the floats of a quantised checkpoint while a model is optimised without a bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.bundle.weights_file import WeightsFile
from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.structure import Structure


def scratch_place() -> Path:
    """Where scratch files are made; the variable TMPDIR moves it."""
    return Path(tempfile.gettempdir())


class Scratch:
    """Room for all weights of a model, on the disk of :func:`scratch_place`; it goes when nothing holds a weight of it.

    Attributes:
        folder: for files that go with it.
    """

    def __init__(self, directory: CheckpointDirectory, structure: Structure) -> None:
        self._directory, self._folder = directory, TemporaryFolder()
        self.folder = Path(self._folder.name)
        capacity = structure.bytes + 64 * (len(list(structure.model.parameters())) + 1)
        self._file = WeightsFile(self.folder / "floats", capacity * 9 // 8, 0)

    def keep(self, path: str, value: torch.Tensor, sources: list[str]) -> torch.Tensor | None:
        """Write a Parameter that is not a view of the checkpoint's files; the tensor that takes its place."""
        del path, sources
        return None if self._file.mapped.holds(value) or self._directory.holds(value) else self._file.add(value)

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()

    def release(self) -> None:
        """Take its pages out of this process's memory."""
        self._file.mapped.release()

"""A checkpoint directory on several ranks: none of them holds more of it in memory than its experts and two layers.

The weights are pages of files. Where the files have them as the model has, those are the checkpoint's own; else the
first rank of a machine makes them once, in a folder that all its ranks share, and verifies every block. The others wait
for it, map what it has written, and take its verdicts.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path

from moeopt.calls.directory import optimize_directory
from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.journal import Workspace, is_own
from moeopt.checkpoint.preflight import made_anew
from moeopt.checkpoint.stream import check_directory
from moeopt.checkpoint.structure import structure_of
from moeopt.distributed.channel import Channel
from moeopt.errors import UsageError
from moeopt.file_lock import CAN_LOCK
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.sizes import in_words
from moeopt.value_types import PyObject

READING = "reading the checkpoint"
PAUSE = 0.5
"""Seconds between two looks at whether the rank that works is done."""


@dataclasses.dataclass(frozen=True)
class DirectoryCall:
    """What :func:`moeopt.optimize` is given for a directory, and where its ranks share their work."""

    example_inputs: PyObject = None
    workspace: str | os.PathLike[str] | None = None
    task: str | None = None
    trust_remote_code: bool = False
    options: Options | None = None
    fields: Mapping[str, PyObject] = dataclasses.field(default_factory=dict)

    @property
    def given(self) -> list[str]:
        """The names of those that were given."""
        defaults = DirectoryCall()
        names = [f.name for f in dataclasses.fields(self) if f.name != "fields"]
        return [n for n in names if getattr(self, n) is not getattr(defaults, n)] + list(self.fields)


def optimized_directory(path: str | os.PathLike[str], channel: Channel, call: DirectoryCall) -> Optimized:
    """The optimised model of a directory, on each rank of ``channel``; its weights are mapped.

    Raises:
        UsageError, CheckpointError: as :func:`moeopt.optimize`; or ``workspace`` is needed and was not given.
        RankLostError: another rank is lost meanwhile.
    """
    path = check_directory(path)
    asked = Options.from_fields(call.options, call.fields)

    def say(line: str) -> None:
        channel.look(READING)
        asked.say(line)

    def wait() -> None:
        channel.look(READING)
        time.sleep(PAUSE)

    workspace = None if call.workspace is None else Workspace(_checked(call.workspace), wait)
    if workspace is None:
        _refuse_held(Path(path), call, asked)
    made = optimize_directory(
        path, call.example_inputs, "torch", dataclasses.replace(asked, progress=say), None, call.task,
        call.trust_remote_code, workspace,
    )  # fmt: skip
    channel.wait_for_all(READING)
    return made


def _checked(folder: str | os.PathLike[str]) -> Path:
    found = Path(folder).absolute()
    if not CAN_LOCK:
        raise UsageError("workspace= is shared by locks on its folder, which this system does not have: use Linux")
    if found.is_file():
        raise UsageError(f"workspace={str(folder)!r} is a file: give a folder, which is made where there is none")
    others = sorted(path.name for path in found.iterdir() if not is_own(path.name)) if found.is_dir() else []
    if others:
        raise UsageError(
            f"workspace={str(folder)!r} holds {others[0]!r}, which is none of moeopt's files there: give a folder of "
            "its own, where files are written over and removed"
        )
    return found


def _refuse_held(path: Path, call: DirectoryCall, options: Options) -> None:
    """Weights that no file holds as the model has them would be in the memory of every rank."""
    structure = structure_of(path, call.task, call.trust_remote_code, options.dtype)
    anew = made_anew(CheckpointDirectory(path), structure)
    if anew > max(structure.layer_bytes, structure.rest_bytes):
        raise UsageError(
            f"{path} has {in_words(anew)} of weights in another form than the model (experts that are apart in the "
            "files, another dtype), which each rank would hold whole: give workspace=, a folder with "
            f"{in_words(structure.bytes)} free that the ranks of this machine share"
        )

"""A checkpoint directory as a model to optimise, of which no more than two layers are ever in memory.

files      index and headers checked                                          (checkpoint/directory)
structure  every module on the meta device; what it takes against what is free  (checkpoint/structure, preflight)
weights    made by transformers one Parameter at a time; each is written to the bundle's weights file and mapped
           from there, or, with no bundle asked for, mapped from the checkpoint   (checkpoint/load, journal)
           quantised ones are made floats one matrix at a time, in that file or a scratch file  (checkpoint/expanded)
optimise   as any model: the weights are pages of files, which the kernel drops    (pipeline/run)
layers     each compared with its original on what really arrives there            (checkpoint/layer_checks)
save       the weights file is complete already; graph and certificate join it      (bundle/weights_file)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moeopt.bundle.mapped_file import MappedFile, give_back
from moeopt.bundle.temp_folder import folders_in
from moeopt.bundle.weights_file import becomes_the_bundles
from moeopt.checkpoint.alike_layers import AlikeLayers
from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.expanded import ExpandedDirectory, as_its_floats, expanded
from moeopt.checkpoint.journal import Journal, Workspace, bytes_begun
from moeopt.checkpoint.kept_weights import journal_of, load_kept
from moeopt.checkpoint.layer_checks import check_layers, failure, in_words
from moeopt.checkpoint.load import generation_config
from moeopt.checkpoint.preflight import check_out, preflight
from moeopt.checkpoint.rehearsal import rehearse
from moeopt.checkpoint.scratch import Scratch
from moeopt.checkpoint.structure import Structure, structure_of
from moeopt.codes_in_files import codes_in
from moeopt.errors import CaptureError, CheckpointError, NotSaveableError, UsageError
from moeopt.hub_cache import is_hub_name, on_this_disk
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.other_files import directory_hint, file_hint, home_hint
from moeopt.pipeline.finished_blocks import FinishedBlocks, remembered
from moeopt.published.tensor_files import read_instead
from moeopt.report import Report
from moeopt.value_types import PyObject
from moeopt.verification.model import EndToEnd
from moeopt.verification.results import BlockCheck

LOG = logging.getLogger("moeopt")
STREAMED = "streamed: each block and each layer verified; end to end composed from layers"
STREAMED_ENGINE = "streamed: each block verified as the engine computes it, and the engine end to end"
"""An engine has no layers that could be called one by one."""
STREAMED_QUANTISED = "streamed: read from the files as needed, and the experts' rounded weights held in memory"


def check_directory(path: str | os.PathLike[str]) -> Path:
    """The directory of a Hugging Face checkpoint, by its path or its name in the local cache; else ``UsageError``."""
    found = on_this_disk(Path(path))
    if not (found / "config.json").is_file():
        if hint := file_hint(Path(path)) or directory_hint(Path(path)):
            raise UsageError(f"{path} is {hint}")
        what = "a directory without config.json" if Path(path).is_dir() else "no directory"
        name = str(path)
        hub = (
            f"; if {name} is a name of the Hugging Face hub, huggingface_hub.snapshot_download({name!r}) fetches it "
            "and returns its directory"
            if is_hub_name(name)
            else ""
        )
        raise UsageError(
            f"{path} is {what}: give a model, or the directory of a Hugging Face checkpoint (config.json and "
            f"*.safetensors){hub}{home_hint(Path(path))}"
        )
    return found


@dataclass
class StreamedModel:
    """A model whose weights are on disk, and what is known of how it came here.

    Attributes:
        model: in eval mode on the CPU; its Parameters are mapped.
        layers: the paths of its layers.
        notes: sentences for the report.
        scratch: the floats of a quantised checkpoint, where no bundle was asked for.
    """

    model: PyObject
    layers: tuple[str, ...]
    notes: list[str]
    options: Options
    journal: Journal | None = None
    file: CheckpointDirectory | MappedFile | None = None
    scratch: Scratch | None = None
    saved: bool = False

    @property
    def folder(self) -> Path | None:
        """Where files may be written that go with the run; None where memory is to be used."""
        held = self.scratch or self.journal
        return None if held is None else held.folder

    def release(self) -> None:
        """Give back what the layer that is done has taken: pages of its file, and freed memory."""
        for file in (self.file, self.scratch):
            if file is not None:
                file.release()
        give_back()

    def finish(self, shared: bool) -> None:
        """All is done: others may read what is ``shared``."""
        if shared and self.journal is not None:
            self.journal.finish()
            self.saved = True

    def noted(self, report: Report) -> Report:
        """``report`` with what is to say of the directory."""
        return dataclasses.replace(report, notes=(*report.notes, *self.notes))

    def check(self, optimized: Optimized) -> None:
        """Compare layer by layer, and say in report and certificate that the model was streamed."""
        if isinstance(self.file, CheckpointDirectory):  # its weights are still read from there
            self.file.check_unchanged()
        certificate, notes = optimized.certificate, [*self.notes]
        same_form = isinstance(optimized.model, nn.Module) and not certificate.lossy
        if certificate.level != "off" and same_form and optimized.report.rewritten:
            self.options.say("comparing layer by layer")
            blocks = [b.name for b in optimized.report.rewritten]
            known, note = ({}, _nothing) if self.journal is None else (self.journal.layers, self.journal.note_layer)
            layers = check_layers(
                self.model, optimized.model, optimized._call, self.layers, blocks, known, note, self.release
            )
            if layers:
                notes.append(in_words(layers))
            if why := failure(layers):
                certificate.end_to_end = dataclasses.replace(
                    certificate.end_to_end or EndToEnd(False), passed=False, reason=why
                )
        if certificate.end_to_end is not None:
            end = certificate.end_to_end
            said = STREAMED if same_form else STREAMED_QUANTISED if certificate.lossy else STREAMED_ENGINE
            notes.insert(0, f"{said}: distance at most {end.distance:.2e} (budget {end.budget:.2e})")
        certificate.notes += notes
        optimized.report = dataclasses.replace(optimized.report, notes=(*optimized.report.notes, *notes))

    def save(self, optimized: Optimized, out: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the bundle; its weights are on the disk already where they were streamed to ``out``."""
        whole = self.options.quantize is None  # else the bundle holds codes, and the file floats
        file = self.journal.file if self.journal is not None and whole else None
        with becomes_the_bundles(file):
            done = optimized.save(out, overwrite=overwrite)
        self.saved = True
        return done


@contextlib.contextmanager
def streamed(
    path: str | os.PathLike[str],
    options: Options,
    *,
    backend: str = "torch",
    out: str | os.PathLike[str] | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    alike: bool = False,
    inputs: PyObject = None,
    workspace: Workspace | None = None,
) -> Iterator[StreamedModel]:
    """The model of a directory, its weights on disk, while it is optimised and saved to ``out``.

    Args:
        options: of the run; ``dtype`` is applied to each weight as it is read.
        alike: give every layer the weights of the first one that is like it, and read no other; without ``out``.
        inputs: the example inputs that blocks will be verified on; None where they are made up for ``options.seed``.
        workspace: what several processes share instead of ``out``: one makes the weights and verifies, the others map
            what it has written.

    Raises:
        UsageError: memory or disk do not suffice, the destination cannot be written to, or transformers cannot build
            the model; nothing was read.
        CheckpointError: files are missing or damaged, or do not fit the model.
    """
    source, target = Path(path), None if out is None else Path(out)
    if target is not None:
        check_out(source, target, options, overwrite)
    stored = CheckpointDirectory(source)
    structure = structure_of(source, task, trust_remote_code, options.dtype)
    directory = expanded(stored, structure.model, options.dtype)
    as_its_floats(structure.model.config)
    generation_config(source)
    kinds = AlikeLayers(structure) if alike else None
    kept, folder = (target, target) if workspace is None else (workspace, workspace.folder)
    found = preflight(directory, structure, folder, 0 if kept is None else bytes_begun(kept), kinds, backend, options)
    options.say(str(found))
    rehearse(directory, structure.model, options.dtype)
    journal = None if kept is None else journal_of(kept, directory, structure, options, backend, inputs)
    held = StreamedModel(None, structure.layers, [], options, journal, None if journal is None else journal.file.mapped)
    refused = False
    try:
        finished = _load(held, kinds, directory, structure)
        directory.check_unchanged()
        with (
            remembered(finished),
            codes_in(held.folder),
            read_instead({} if kinds is None else kinds.read_for(stored)),
            folders_in(None if target is None else target.absolute().parent),
        ):
            yield held
        held.finish(workspace is not None)
    except (CheckpointError, NotSaveableError, CaptureError):
        refused = True
        raise
    finally:
        if journal is not None:
            _close(journal, held.saved, refused, kept is workspace)


def _load(
    held: StreamedModel, kinds: AlikeLayers | None, directory: CheckpointDirectory, structure: Structure
) -> FinishedBlocks | None:
    """Give ``held`` its model; verdicts that are known."""
    if kinds is not None:
        kinds.load(held, directory, held.options.dtype)
        return kinds.finished
    if held.journal is None and isinstance(directory, ExpandedDirectory):
        held.scratch = Scratch(directory, structure)
    held.model, held.notes, held.file = load_kept(
        held.journal, directory, structure, held.options, held.release, held.scratch
    )
    return _noting(held)


def _close(journal: Journal, saved: bool, refused: bool, shared: bool) -> None:
    """Keep what is done only where a later call, or another process, can go on from there."""
    begun = journal.begun and journal.writes and not saved
    journal.close((saved and not shared) or refused)
    if begun and refused:
        LOG.warning(
            "%s is removed: what was done there belongs to files, options and inputs that end in this error, and a "
            "call with others begins anew", journal.folder,
        )  # fmt: skip
    elif begun:
        LOG.warning(
            "%s keeps what is done: the same call goes on from there; delete it to give the work up", journal.folder
        )


def _noting(held: StreamedModel) -> FinishedBlocks:
    """Verdicts go to the journal, if there is one, and what verifying a block has taken is given back."""

    def note(check: BlockCheck) -> None:
        if held.journal is not None:
            held.journal.note_block(check)
        held.release()

    return FinishedBlocks({} if held.journal is None else held.journal.blocks, note)


def _nothing(*given: object) -> None:
    del given

"""A checkpoint directory as a model to optimise, of which no more than two layers are ever in memory.

    files      index and headers checked                                          (checkpoint/directory)
    structure  every module on the meta device; what it takes against what is free  (checkpoint/structure, preflight)
    weights    made by transformers one Parameter at a time; each is written to the bundle's weights file and mapped
               from there, or, with no bundle asked for, mapped from the checkpoint   (checkpoint/load, journal)
    optimise   as any model: the weights are pages of files, which the kernel drops    (pipeline/run)
    layers     each compared with its original on what really arrives there            (checkpoint/layer_checks)
    save       the weights file is complete already; graph and certificate join it      (bundle/weights_file)
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt.bundle.destination import check_destination
from moeopt.bundle.manifest import check_target, version
from moeopt.bundle.weights_file import becomes_the_bundles
from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.journal import Journal, bytes_begun, folder_of
from moeopt.checkpoint.layer_checks import check_layers, failure, in_words
from moeopt.checkpoint.load import load_mapped, refuse_quantised
from moeopt.checkpoint.preflight import preflight
from moeopt.checkpoint.structure import Structure, structure_of
from moeopt.errors import UsageError
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.pipeline.finished_blocks import FinishedBlocks, remembered
from moeopt.verification.model import EndToEnd

LOG = logging.getLogger("moeopt")
STREAMED = "streamed: each block and each layer verified; end to end composed from layers"


def is_directory(model: object) -> bool:
    """Whether ``model`` names a checkpoint directory (one with a config.json)."""
    return isinstance(model, (str, os.PathLike)) and (Path(model) / "config.json").is_file()


@dataclass
class StreamedModel:
    """A model whose weights are on disk, and what is known of how it came here.

    Attributes:
        model: in eval mode on the CPU; its Parameters are mapped.
        layers: the paths of its layers.
        notes: sentences for the report.
    """

    model: Any
    layers: tuple[str, ...]
    notes: list[str]
    journal: Journal | None = None
    release: Callable[[], None] = field(default=lambda: None)
    saved: bool = False

    def check(self, optimized: Optimized, options: Options) -> None:
        """Compare layer by layer, and say in report and certificate that the model was streamed."""
        certificate, notes = optimized.certificate, [*self.notes]
        same_form = isinstance(optimized.model, nn.Module)
        if options.verify != "off" and same_form and optimized.report.rewritten:
            options.say("comparing layer by layer")
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
            notes.insert(0, f"{STREAMED}: distance at most {end.distance:.2e} (budget {end.budget:.2e})")
        certificate.notes += notes
        optimized.report = dataclasses.replace(optimized.report, notes=(*optimized.report.notes, *notes))

    def save(self, optimized: Optimized, out: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the bundle; its weights are on the disk already where they were streamed to ``out``."""
        file = None if self.journal is None else self.journal.file
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
) -> Iterator[StreamedModel]:
    """The model of a directory, its weights on disk, while it is optimised and saved to ``out``.

    Args:
        options: of the run; ``dtype`` is applied to each weight as it is read.

    Raises:
        UsageError: memory or disk do not suffice, the destination cannot be written to, or transformers cannot build
            the model; nothing was read.
        CheckpointError: files are missing or damaged, or do not fit the model.
    """
    source, target = Path(path), None if out is None else Path(out)
    if target is not None:
        if target.resolve() == source.resolve():
            raise UsageError(f"{target} is the model's own directory: give a new one")
        check_target(target)
        check_destination(target, options.verify != "off", overwrite)
    directory = CheckpointDirectory(source)
    structure = structure_of(source, task, trust_remote_code, options.dtype)
    refuse_quantised(source, structure.model.config)
    found = preflight(directory, structure, target, 0 if target is None else bytes_begun(target))
    options.say(str(found))
    journal = None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        names = sum(len(name) + 160 for name in structure.model.state_dict())
        capacity = structure.bytes + 64 * (len(list(structure.model.parameters())) + 1)
        key = _key(directory, structure, options, backend)
        journal = Journal(target, key, capacity + capacity // 8, 2 * names + (1 << 16))
    held = StreamedModel(None, structure.layers, [], journal)
    try:
        _load(held, directory, structure, options)
        with remembered(None if journal is None else FinishedBlocks(journal.blocks, journal.note_block)):
            yield held
    finally:
        if journal is not None and target is not None:
            journal.close(held.saved)
            if not held.saved and folder_of(target).is_dir():
                LOG.warning("%s keeps what is done: the same call goes on from there", folder_of(target))


def _load(held: StreamedModel, directory: CheckpointDirectory, structure: Structure, options: Options) -> None:
    journal = held.journal
    if journal is None:
        held.model, held.notes = load_mapped(directory, structure.model, options.dtype, lambda *_: None, {})
        held.release = directory.release
        return

    done: set[str] = set()

    def keep(path: str, value: torch.Tensor, sources: list[str]) -> torch.Tensor | None:
        unit = next((layer for layer in held.layers if path.startswith(layer + ".")), "")
        if unit and unit not in done:
            done.add(unit)
            options.say(f"layer {len(done)} of {len(held.layers)}: {unit}")
            directory.release()
            journal.file.mapped.release()
        return journal.keep(path, value, sources)

    if journal.begun:
        options.say(f"going on: {len(journal.weights)} weights and {len(journal.blocks)} blocks are done")
    restored = dict(journal.weights)
    held.model, held.notes = load_mapped(directory, structure.model, options.dtype, keep, restored)
    if not _in_place(held.model, restored):  # transformers gave a restored Parameter another meaning
        journal.forget()
        held.model, held.notes = load_mapped(directory, structure.model, options.dtype, keep, {})
    held.release = journal.file.mapped.release


def _in_place(model: nn.Module, restored: dict[str, tuple[torch.Tensor, list[str]]]) -> bool:
    named = dict(model.named_parameters(remove_duplicate=False))
    return all(
        name in named and named[name].data_ptr() == value.data_ptr() and named[name].stride() == value.stride()
        for name, (value, _) in restored.items()
        if value.numel()
    )


def _key(directory: CheckpointDirectory, structure: Structure, options: Options, backend: str) -> dict[str, Any]:
    """What makes two runs the same work."""
    import transformers

    asked = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in ("progress", "dump")}
    return {
        "checkpoint": directory.identity(),
        "config": structure.model.config.to_json_string(use_diff=False),
        "class": f"{type(structure.model).__module__}.{type(structure.model).__qualname__}",
        "options": {name: repr(value) for name, value in asked.items()},
        "backend": backend,
        "versions": {"moeopt": version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _nothing(*given: object) -> None:
    del given


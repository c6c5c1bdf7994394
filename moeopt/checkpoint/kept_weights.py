"""The weights of a streamed run: made by transformers one at a time, written to its journal's file, mapped from there.

With no journal they stay mapped from the checkpoint. What an earlier run has written is taken as it lies.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moeopt.bundle.manifest import version
from moeopt.bundle.mapped_file import MappedFile
from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.journal import Journal, Workspace, digest_of_call
from moeopt.checkpoint.load import Keep, load_mapped
from moeopt.checkpoint.scratch import Scratch
from moeopt.checkpoint.structure import Structure
from moeopt.options import Options
from moeopt.published.directory_of import stated_by
from moeopt.value_types import PyObject


def journal_of(
    out: PyObject, directory: CheckpointDirectory, structure: Structure, options: Options, backend: str,
    inputs: PyObject,
) -> Journal:  # fmt: skip
    """The journal of a run to ``out``, a bundle's path or a :class:`Workspace`."""
    if not isinstance(out, Workspace):
        out.parent.mkdir(parents=True, exist_ok=True)
    header = 2 * sum(len(name) + 160 for name in structure.model.state_dict()) + (1 << 16)
    capacity = structure.bytes + 64 * (len(list(structure.model.parameters())) + 1)
    return Journal(out, _key(directory, structure, options, backend, inputs), capacity * 9 // 8, header)


def load_kept(
    journal: Journal | None, directory: CheckpointDirectory, structure: Structure, options: Options,
    release: Callable[[], None], scratch: Scratch | None = None,
) -> tuple[Any, list[str], CheckpointDirectory | MappedFile]:  # fmt: skip
    """``(model, notes, the files that its weights are mapped from)``.

    Args:
        release: gives back what the layer that is done has taken.
        scratch: with no journal, where Parameters go that no file holds as numbers.
    """
    if journal is None:
        aside: Keep = (lambda *_: None) if scratch is None else scratch.keep
        model, notes = load_mapped(directory, structure.model, options.dtype, aside, {})
        if scratch is not None:
            scratch.close()
        return model, notes, directory
    done: set[str] = set()

    def keep(path: str, value: torch.Tensor, sources: list[str]) -> torch.Tensor | None:
        if journal.file.mapped.holds(value):
            return None
        unit = next((layer for layer in structure.layers if path.startswith(layer + ".")), "")
        if unit and unit not in done:
            done.add(unit)
            options.say(f"layer {len(done)} of {len(structure.layers)}: {unit}")
            directory.release()
            release()
        return journal.keep(path, value, sources)

    if journal.begun:
        options.say(f"going on: {len(journal.weights)} weights and {len(journal.blocks)} blocks are done")
    restored = dict(journal.weights)
    model, notes = load_mapped(directory, structure.model, options.dtype, keep, restored)
    if not _in_place(model, restored):  # transformers gave a restored Parameter another meaning
        journal.forget()
        model, notes = load_mapped(directory, structure.model, options.dtype, keep, {})
    return model, notes, journal.file.mapped


def _in_place(model: nn.Module, restored: dict[str, tuple[torch.Tensor, list[str]]]) -> bool:
    named = dict(model.named_parameters(remove_duplicate=False))
    return all(
        name in named and named[name].data_ptr() == value.data_ptr() and named[name].stride() == value.stride()
        for name, (value, _) in restored.items()
        if value.numel()
    )


def _key(
    directory: CheckpointDirectory, structure: Structure, options: Options, backend: str, inputs: PyObject
) -> dict[str, Any]:
    """What makes two runs the same work."""
    import transformers

    asked = {
        f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in ("progress", "dump")
    }
    return {
        "checkpoint": directory.identity(),
        "config": structure.model.config.to_json_string(use_diff=False),
        "quantised": json.dumps(stated_by(directory.path), sort_keys=True),  # what codes stand for
        "class": f"{type(structure.model).__module__}.{type(structure.model).__qualname__}",
        "options": {name: repr(value) for name, value in asked.items()},
        "backend": backend,
        "inputs": digest_of_call(inputs),
        "versions": {"moeopt": version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }

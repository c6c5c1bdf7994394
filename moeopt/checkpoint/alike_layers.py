"""One layer of each kind for all layers that are alike: enough to say what would become of a model, without reading it.

Layers are of a kind where they are of one class and their Parameters have the same names, shapes and dtypes. The others
get the tensors of the first, of the files and of the model, so no more is read and held than one layer of each kind.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from moeopt.checkpoint.directory import CheckpointDirectory, CheckpointTensor
from moeopt.checkpoint.load import load_mapped
from moeopt.checkpoint.structure import Structure
from moeopt.pipeline.finished_blocks import FinishedBlocks
from moeopt.value_types import PyObject
from moeopt.verification.results import BlockCheck


class AlikeLayers:
    """The layers of a model by kind.

    Attributes:
        first: for each layer's path, that of the first layer of its kind.
        bytes: of the first layer of each kind, and of what is outside the layers.
        finished: the verdict on a block of a first layer, for the same block of the layers like it.
    """

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        kinds: dict[Any, str] = {}
        modules = {path: structure.model.get_submodule(path) for path in structure.layers}
        self.first = {path: kinds.setdefault(_kind(module), path) for path, module in modules.items()}
        likened = [module for path, module in modules.items() if self.first[path] != path]
        self.bytes = structure.bytes - sum(p.numel() * p.element_size() for m in likened for p in m.parameters())
        self._checks: dict[str, BlockCheck] = {}
        self.finished = FinishedBlocks(self._checks, self._note)

    def load(self, held: PyObject, directory: CheckpointDirectory, dtype: torch.dtype | None) -> None:
        """Give ``held`` the model, and a note on which layers were read."""
        made: dict[str, torch.Tensor] = {}

        def keep(path: str, value: torch.Tensor, sources: list[str]) -> torch.Tensor | None:
            layer = self._layer_of(path)
            if layer is None:
                return None
            twin = self.first[layer] + path.removeprefix(layer)
            return made.setdefault(twin, value)

        view = _FirstLayers(directory, self)
        held.model, held.notes = load_mapped(view, self._structure.model, dtype, keep, {})
        likened = len(self.first) - len(set(self.first.values()))
        if likened:
            held.notes.append(
                f"{len(set(self.first.values()))} of {len(self.first)} layers were read, one of each kind "
                f"({', '.join(dict.fromkeys(self.first.values()))}): what is said of the other {likened} is what was "
                "seen of the one like it"
            )

    def read_for(self, directory: CheckpointDirectory) -> dict[str, str]:
        """By the name of a tensor of ``directory``, the one that is read for it."""
        return {name: entry.name for name, entry in _FirstLayers(directory, self).items()}

    def _layer_of(self, path: str) -> str | None:
        return next((layer for layer in self.first if path.startswith(layer + ".")), None)

    def _note(self, check: BlockCheck) -> None:
        layer = self._layer_of(check.name + ".")
        for other, first in self.first.items():
            if first == layer and other != layer:
                name = other + check.name.removeprefix(layer)
                self._checks[name] = dataclasses.replace(check, name=name)


class _FirstLayers(CheckpointDirectory):
    """A directory in which the tensors of a layer are those of the first layer of its kind, where names tell which."""

    def __init__(self, directory: CheckpointDirectory, layers: AlikeLayers) -> None:
        self.__dict__.update(directory.__dict__)
        self._whole = directory
        self._entries = {name: self._first(name, directory, layers) for name in directory}

    def tensor(self, name: str) -> torch.Tensor:
        return self._whole.tensor(self._entries[name].name)

    @staticmethod
    def _first(name: str, directory: CheckpointDirectory, layers: AlikeLayers) -> CheckpointTensor:
        for found in re.finditer(r"(?<![^.])\d+(?=\.)", name):
            number = found[0]
            path = next((p for p in layers.first if p.rpartition(".")[2] == number), None)
            if path is None or not _named_alike(name[: found.start()], path):
                continue
            other = name[: found.start()] + layers.first[path].rpartition(".")[2] + name[found.end() :]
            twin = directory.get(other)
            if twin is not None and (twin.shape, twin.dtype) == (directory[name].shape, directory[name].dtype):
                return twin
        return directory[name]


def _named_alike(prefix: str, path: str) -> bool:
    """Whether the list that a number in a tensor's name counts is that of the layers (``model.layers.``)."""
    ours, theirs = path.split(".")[:-1], prefix.rstrip(".").split(".")
    return bool(ours) and ours[-1] == theirs[-1]


def _kind(layer: nn.Module) -> tuple[object, ...]:
    return type(layer), tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())

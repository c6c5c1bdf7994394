"""transformers loads a model as it always does, and its weights stay on disk: mapped from the checkpoint, or kept.

The class's own ``from_pretrained`` runs, with its renamings, converters (experts that are apart in the files and one
Parameter in the model), casts and ties. It is given views of the files instead of tensors, and each Parameter that it
made of them is handed to ``keep`` before the next one is made, so that no more than one is in memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.unfit import broken_words, mismatch_words, unfit
from moeopt.errors import CheckpointError
from moeopt.listed import listed
from moeopt.options import variable_set
from moeopt.patches import kept_load_report
from moeopt.published.directory_of import stated_by
from moeopt.published.headers import interrupted
from moeopt.value_types import PyObject

Keep = Callable[[str, torch.Tensor, list[str]], torch.Tensor | None]
"""The Parameter's path in the model, its value, and the tensors of the checkpoint that it was made of -> the tensor
that takes its place, or None."""


def load_mapped(
    directory: CheckpointDirectory,
    structure: PyObject,
    dtype: torch.dtype | None,
    keep: Keep,
    instead: Mapping[str, tuple[torch.Tensor, list[str]]],
) -> tuple[Any, list[str]]:
    """``(model, notes)``: the model in eval mode on the CPU, its weights mapped or as ``keep`` gave them.

    Args:
        structure: the same model on the meta device: its class and config.
        dtype: what floating-point weights are cast to; None means what the checkpoint or its config says.
        instead: Parameters that were made before, by path: the value, and the tensors that are not read for it.

    Raises:
        CheckpointError: weights are missing or of other shapes, or a conversion failed; the message names them.
    """
    generation = generation_config(directory.path)  # before the hours of weights
    spared = {name for _, sources in instead.values() for name in sources}
    read = TensorReads()
    state: dict[str, Any] = {name: read.slice(directory, name) for name in directory if name not in spared}
    state |= {name: value for name, (value, _) in instead.items()}
    try:
        with one_at_a_time() as broken, ParametersGoTo(keep, read):
            model, info = type(structure).from_pretrained(
                None, config=structure.config, state_dict=state, dtype=dtype or "auto", output_loading_info=True
            )
    except (RuntimeError, ValueError, KeyError) as err:
        why = broken_words(directory, broken) if broken else f"{type(err).__name__}: {_words(err)}"
        raise unfit(directory, type(structure).__name__, why) from err
    refuse_missing(directory, model, info)
    model.config.name_or_path = str(directory.path)
    if hasattr(model, "generation_config") and generation is not None:
        model.generation_config = generation
    unexpected = sorted(info.get("unexpected_keys") or ())
    notes = [f"{listed(unexpected)} of the checkpoint belong to nothing in the model"] if unexpected else []
    return model.eval(), notes


class TensorReads:
    """Which tensors of the checkpoint were read since a Parameter was last made of some."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.taken = True

    def slice(self, directory: CheckpointDirectory, name: str) -> PyObject:
        import transformers

        if int(transformers.__version__.split(".")[0]) < 5:  # has no converters, and takes tensors
            return directory.tensor(name)
        return _Slice(self, directory, name)

    def note(self, name: str) -> None:
        if self.taken:
            self.names, self.taken = [], False
        self.names.append(name)

    def take(self) -> list[str]:
        self.taken = True
        return self.names


class Deferred:
    """What transformers takes for a tensor of a file that it did not read yet; ``[...]`` reads."""

    def __init__(self, read: TensorReads, directory: CheckpointDirectory, name: str) -> None:
        self.read, self.directory, self._name = read, directory, name
        self.shape, self.dtype = directory[name].shape, directory[name].dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)


class _Slice(Deferred):
    """A tensor of the checkpoint."""

    def __getitem__(self, index: PyObject) -> torch.Tensor:
        self.read.note(self._name)
        return self.directory.tensor(self._name)[index]


class ParametersGoTo:
    """While open, each Parameter that transformers has filled passes through ``keep`` as it is registered."""

    def __init__(self, keep: Keep, read: TensorReads) -> None:
        self.keep, self.read, self.thread = keep, read, threading.get_ident()
        self.parents: dict[nn.Module, tuple[nn.Module, str]] = {}

    def __enter__(self) -> None:
        from torch.nn.modules import module

        self.handles = [
            module.register_module_module_registration_hook(self._child),
            module.register_module_parameter_registration_hook(self._parameter),  # type: ignore[arg-type]  # torch
        ]

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.parents.clear()

    def _child(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None and threading.get_ident() == self.thread:
            self.parents[child] = parent, name

    def _parameter(self, module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        made = value is not None and not value.is_meta and getattr(value, "_is_hf_initialized", False)
        if value is None or not made or threading.get_ident() != self.thread:
            return None
        kept = self.keep(self._path(module, name), value.detach(), self.read.take())
        if kept is None:
            return None
        instead = nn.Parameter(kept, requires_grad=value.requires_grad)
        instead.__dict__.update(value.__dict__)  # transformers marks what it has filled
        return instead

    def _path(self, module: nn.Module, name: str) -> str:
        parts = [name]
        while module in self.parents:
            module, own = self.parents[module]
            parts.append(own)
        return ".".join(reversed(parts))


@contextlib.contextmanager
def one_at_a_time() -> Iterator[Mapping[str, str]]:
    """While open, transformers reads a tensor when it needs it, not all of them ahead in threads, and draws no bar.

    moeopt says what does not fit, and transformers logs no report of it. Yields the Parameters that could not be put
    together, by path, with transformers' own words.
    """
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with variable_set("HF_DEACTIVATE_ASYNC_LOAD", "1"), kept_load_report() as broken:
            yield broken
    finally:
        if bar:
            logging.enable_progress_bar()


def refuse_missing(directory: CheckpointDirectory, model: nn.Module, info: Mapping[str, Any]) -> None:
    """``CheckpointError`` for Parameters that no tensor of the files gives, or one of another shape."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        way = interrupted(directory.path) or _codes_without_a_config(directory)
        raise CheckpointError(
            f"{directory.path} holds no values for {listed(missing)} of {type(model).__name__}, and random numbers are "
            f"no model: a file may be missing ({len(directory.files)} are there), or --task (task=) may be another one"
            f"{way and f'; {way}'}"
        )
    if why := mismatch_words(info.get("mismatched_keys") or ()):
        raise unfit(directory, type(model).__name__, why)


def _codes_without_a_config(directory: CheckpointDirectory) -> str:
    """That the files hold packed codes of which no config says how they are read; "" where they do not."""
    packed = next((name for name in directory if name.endswith((".weight_packed", ".qweight", "_blocks"))), None)
    if packed is None or stated_by(directory.path):
        return ""
    return (
        f"{packed} holds codes of a quantised model, and config.json has no quantization_config that says how they are "
        "read: fetch config.json again"
    )


def generation_config(path: Path) -> PyObject:
    """What ``from_pretrained`` reads of the directory beside config and weights; None where it has no such file."""
    file = path / "generation_config.json"
    if not file.is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{file} is damaged ({type(err).__name__}: {_words(err)}): fetch it again, or remove it, and the model "
            "generates as its config says"
        ) from err


def _words(err: Exception) -> str:
    return " ".join(str(err).split())[:300]

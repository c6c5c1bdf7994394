"""transformers loads a model from tensors without values: what does not fit is found before a weight is read.

Every renaming, merge and cast of the real load runs (``checkpoint/load``), on shapes and dtypes alone. It takes seconds
and no memory where the real one takes hours. Parameters that no tensor gives are left to the real load.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.load import Deferred, ParametersGoTo, TensorReads, listed, one_at_a_time
from moeopt.errors import CheckpointError
from moeopt.value_types import PyObject

LOG = logging.getLogger("moeopt")


def rehearse(directory: CheckpointDirectory, structure: nn.Module, dtype: torch.dtype | None) -> None:
    """Raise what loading ``directory`` would end in.

    Args:
        structure: the model on the meta device: its class and config.
        dtype: as for :func:`moeopt.checkpoint.load.load_mapped`.

    Raises:
        CheckpointError: tensors of other shapes, a set of experts' tensors that is not whole, or codes of a quantised
            model that would be taken for numbers; the message names the tensors.
    """
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:  # takes tensors, not what stands for them
        return
    read, without_values = TensorReads(), FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[str, tuple[torch.dtype, list[str]]] = {}
    kind = type(structure).__name__

    def note(path: str, value: torch.Tensor, sources: list[str]) -> None:
        made[path] = value.dtype, sources

    try:
        with one_at_a_time() as broken, ParametersGoTo(note, read):
            _, info = type(structure).from_pretrained(  # type: ignore[attr-defined]  # a model of transformers
                None, config=structure.config, dtype=dtype or "auto", output_loading_info=True,
                ignore_mismatched_sizes=True,
                state_dict={name: _Shape(read, directory, name, without_values) for name in directory},
            )  # fmt: skip
    except Exception as err:
        if broken:
            why = "; ".join([f"{listed(broken)} cannot be put together", *odd_experts(directory)])
            raise CheckpointError(unfit(directory, kind, why)) from err
        LOG.debug("%s could not be rehearsed: %r", directory.path, err)  # loading it will tell
        return
    other = sorted(info.get("mismatched_keys") or (), key=str)
    if other:
        name, stored, wanted = other[0]
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        why = f"{name} is {list(stored)} in the files and {list(wanted)} by config.json{more}"
        raise CheckpointError(unfit(directory, kind, why))
    _refuse_codes(directory, made, set(info.get("unexpected_keys") or ()))


def unfit(directory: CheckpointDirectory, kind: str, why: str) -> str:
    """What is said of files that a model of class ``kind`` cannot be made of."""
    return (
        f"{directory.path}: its tensors do not become a {kind} ({why}): config.json and the weights may be of two "
        "versions; fetch both again"
    )


def odd_experts(directory: CheckpointDirectory) -> list[str]:
    """In words, the first tensor that one expert lacks and others have, or that has another shape than theirs;
    [] where there is none."""
    named: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in directory:
        parts = name.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        if len(numbers) > 1:  # of a layer, and of an expert in it
            prefix, suffix = ".".join(parts[: numbers[-1]]), ".".join(parts[numbers[-1] + 1 :])
            named[prefix][suffix][int(parts[numbers[-1]])] = name
    found = []
    for prefix, by_suffix in sorted(named.items()):
        everyone = set().union(*by_suffix.values())
        for suffix, there in sorted(by_suffix.items()):
            gone = sorted(everyone - there.keys())
            if 0 < len(gone) < len(there):
                found.append(f"{prefix}.{gone[0]}.{suffix} is not there, and {len(there)} like it are")
            shape, most = Counter(directory[name].shape for name in there.values()).most_common(1)[0]
            odd = sorted(name for name in there.values() if directory[name].shape != shape)
            if 0 < len(odd) < most:
                found.append(f"{odd[0]} is {list(directory[odd[0]].shape)}, and {most} like it are {list(shape)}")
    return found[:1]


def _refuse_codes(
    directory: CheckpointDirectory, made: Mapping[str, tuple[torch.dtype, list[str]]], unexpected: set[str]
) -> None:
    """Integers that would become numbers as they are, and 8-bit floats whose scale would be left out."""
    scaled = {name.rpartition(".")[0]: name for name in unexpected if "scale" in name.rpartition(".")[2]}
    for path, (dtype, sources) in made.items():
        for name in sources:
            stored, scale = directory[name].dtype, scaled.get(name.rpartition(".")[0])
            if not dtype.is_floating_point or (stored.is_floating_point and (stored.itemsize > 1 or scale is None)):
                continue
            beside = "" if scale is None else f" with {scale} beside them"
            raise CheckpointError(
                f"{directory[name].file}: the tensor {name!r} holds {str(stored).removeprefix('torch.')}{beside}: no "
                f"values of {path}, but codes of a quantised model, and config.json has no quantization_config that "
                "says how they are read: fetch config.json again, or convert the checkpoint to floats"
            )


class _Shape(Deferred):
    """A tensor of a directory without its values."""

    def __init__(
        self, read: TensorReads, directory: CheckpointDirectory, name: str, without_values: FakeTensorMode
    ) -> None:
        super().__init__(read, directory, name)
        self._without_values = without_values

    def __getitem__(self, index: PyObject) -> torch.Tensor:
        self.read.note(self._name)
        with self._without_values:
            made: Any = torch.empty(self.shape, dtype=self.dtype)
            return made[index]  # type: ignore[no-any-return]

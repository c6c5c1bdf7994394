"""transformers loads a model from tensors without values: what does not fit is found before a weight is read.

Every renaming, merge and cast of the real load runs (``checkpoint/load``), on shapes and dtypes alone. It takes seconds
and no memory where the real one takes hours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.checkpoint.load import Deferred, ParametersGoTo, TensorReads, one_at_a_time, refuse_missing
from moeopt.checkpoint.unfit import broken_words, unfit
from moeopt.errors import CheckpointError
from moeopt.patches import no_fake_tensor_errors
from moeopt.published.directory_of import stated_by
from moeopt.value_types import PyObject

LOG = logging.getLogger("moeopt")


def rehearse(directory: CheckpointDirectory, structure: nn.Module, dtype: torch.dtype | None) -> None:
    """Raise what loading ``directory`` would end in.

    Args:
        structure: the model on the meta device: its class and config.
        dtype: as for :func:`moeopt.checkpoint.load.load_mapped`.

    Raises:
        CheckpointError: tensors that are missing or of other shapes, a set of experts' tensors that is not whole, or
            codes of a quantised model that would be taken for numbers; the message names the tensors.
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
        with no_fake_tensor_errors(), one_at_a_time() as broken, _WithoutValues(note, read):
            model, info = type(structure).from_pretrained(  # type: ignore[attr-defined]  # a model of transformers
                None, config=structure.config, dtype=dtype or "auto", output_loading_info=True,
                ignore_mismatched_sizes=True,
                state_dict={name: _Shape(read, directory, name, without_values) for name in directory},
            )  # fmt: skip
    except Exception as err:
        if broken:
            raise unfit(directory, kind, broken_words(directory, broken)) from err
        LOG.debug("%s could not be rehearsed: %r", directory.path, err)  # loading it will tell
        return
    refuse_missing(directory, model, info)
    _refuse_codes(directory, made, set(info.get("unexpected_keys") or ()))


def _refuse_codes(
    directory: CheckpointDirectory, made: Mapping[str, tuple[torch.dtype, list[str]]], unexpected: set[str]
) -> None:
    """Integers that would become numbers as they are, and 8-bit floats whose scale would be left out."""
    scaled = {name.rpartition(".")[0]: name for name in unexpected if "scale" in name.rpartition(".")[2]}
    way = (
        "the quantization_config of config.json does not say how these are read: convert the checkpoint to floats"
        if stated_by(directory.path)
        else "config.json has no quantization_config that says how they are read: fetch config.json again, or convert "
        "the checkpoint to floats"
    )
    for path, (dtype, sources) in made.items():
        for name in sources:
            stored, scale = directory[name].dtype, scaled.get(name.rpartition(".")[0])
            if not dtype.is_floating_point or (stored.is_floating_point and (stored.itemsize > 1 or scale is None)):
                continue
            beside = "" if scale is None else f" with {scale} beside them"
            raise CheckpointError(
                f"{directory[name].file}: the tensor {name!r} holds {str(stored).removeprefix('torch.')}{beside}: no "
                f"values of {path}, but codes of a quantised model, and {way}"
            )


class _WithoutValues(ParametersGoTo):
    """A Parameter that no tensor gives stays on the meta device: drawn at random, it may take all memory."""

    def _parameter(self, module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or value.is_meta or getattr(value, "_is_hf_initialized", False):
            return super()._parameter(module, name, value)
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)


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
            made: PyObject = torch.empty(self.shape, dtype=self.dtype)
            return made[index]  # type: ignore[no-any-return]

"""A quantised checkpoint as the floats that it stands for: a matrix is made of its codes when it is read.

    X.weight_packed, X.weight_scale, ...    becomes    X.weight (N, K)
    X_blocks, X_scales                      becomes    X (E, K, N), or (E, N, K) where the model has it so
    X (E, N, K), X_scale_inv                becomes    X (E, N, K)

The codes are read by the room that also binds them to experts (``published``), not by the library that loads the model,
so no second reader decides where a partial block ends. Shape legend: E experts, N out, K in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from moeopt.checkpoint.directory import CheckpointDirectory, CheckpointTensor
from moeopt.errors import UsageError
from moeopt.published.beside_weights import turned_at_each_call
from moeopt.published.directory_of import stated_by
from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.stored_matrix import StoredMatrix
from moeopt.published.tensor_files import SafetensorsDirectory


class ExpandedDirectory(CheckpointDirectory):
    """``directory`` with a tensor of floats in place of each quantised matrix, or stack of matrices.

    Args:
        matrices: by the name of the tensor that they become: one matrix, or those of all experts in order.
        model: whose Parameters they become, on the meta device.
        dtype: of the floats.

    Attributes:
        quantised: the names of the tensors that are made of codes.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        matrices: Mapping[str, list[StoredMatrix]],
        model: nn.Module,
        dtype: torch.dtype,
    ) -> None:
        self.__dict__.update(directory.__dict__)
        self.quantised, self._dtype = dict(matrices), dtype
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._across = {name for name, stack in matrices.items() if _across(stack, shapes.get(name))}
        gone = {tensor for stack in matrices.values() for m in stack for tensor in m.tensors}
        modules = {m.name for stack in matrices.values() for m in stack if m.expert is None}

        def stays(name: str) -> bool:  # a module's codes come with sizes, orders and scales of activations
            module, _, last = name.rpartition(".")
            return name not in gone and (last == "bias" or module not in modules)

        kept = {name: entry for name, entry in directory.items() if stays(name)}
        self._entries = kept | {name: self._floats(name, directory) for name in matrices}

    def tensor(self, name: str) -> torch.Tensor:
        stack = self.quantised.get(name)
        if stack is None:
            return super().tensor(name)
        if stack[0].expert is None:
            return stack[0].read().dequantize(self._dtype)
        made = torch.empty(self._entries[name].shape, dtype=self._dtype)
        for into, matrix in zip(made, stack, strict=True):
            floats = matrix.read().dequantize(self._dtype)
            into.copy_(floats.t() if name in self._across else floats)
        return made

    def lies_there(self, name: str) -> bool:
        return name not in self.quantised

    def _floats(self, name: str, directory: CheckpointDirectory) -> CheckpointTensor:
        stack = self.quantised[name]
        N, K = stack[0].shape
        shape = (N, K) if stack[0].expert is None else (len(stack), *((K, N) if name in self._across else (N, K)))
        file = directory[stack[0].tensors[0]].file
        return CheckpointTensor(name, file, self._dtype, shape, 0, math.prod(shape) * self._dtype.itemsize)


def expanded(directory: CheckpointDirectory, model: nn.Module, dtype: torch.dtype | None) -> CheckpointDirectory:
    """``directory`` itself where nothing in it is quantised, else its tensors with floats in place of codes.

    Args:
        dtype: of the floats; None means that of the model's Parameters.

    Raises:
        UsageError: it is quantised in a form that is not read; the message names the matrix and the reason.
        CheckpointError: scales and codes do not fit each other, or a file is damaged.
    """
    config = stated_by(directory.path)
    if not config:
        return directory
    found = quantised_tensors(SafetensorsDirectory(directory.path), config)
    method = found.method or "some way"
    if turned := turned_at_each_call(config):
        raise UsageError(
            f"{directory.path} is quantised ({method}) with transforms of activations that the model does at each "
            f"call: {turned} of transform_config; its weights alone are another model's. Load it with a library "
            "that does them, and give the model"
        )
    if found.unread:
        name, why = next(iter(found.unread.items()))
        raise UsageError(
            f"{directory.path} is quantised ({method}), and {name} is in a form that is not read: {why}. Load it with "
            "transformers, dequantised, and give the model, or save that model and give its directory"
        )
    stacks: dict[str, list[StoredMatrix]] = defaultdict(list)
    for matrix in found.matrices.values():
        if all(name in directory for name in matrix.tensors):
            stacked = matrix.expert is not None and not matrix.tensors[0].endswith(".weight")
            stacks[matrix.name if stacked else f"{matrix.name}.weight"].append(matrix)
    if not stacks:
        raise UsageError(
            f"config.json says that {directory.path} is quantised ({method}), and no tensor of its files has codes "
            "in a form that is known: load it with transformers, dequantised, and give the model, or save that model "
            "and give its directory; where the files hold floats, take quantization_config out of config.json"
        )
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return ExpandedDirectory(directory, stacks, model, dtype or own)


def as_its_floats(config: object) -> None:
    """Take out of a model's config that it is quantised, so that whoever loads it reads floats."""
    for part in (config, *(getattr(config, key, None) for key in ("text_config", "llm_config", "language_config"))):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config  # type: ignore[union-attr]


def _across(stack: list[StoredMatrix], shape: tuple[int, ...] | None) -> bool:
    """Whether the model's Parameter holds each matrix of a stack transposed.

    MXFP4 is published for GPT-OSS alone, whose Parameters are (E, K, N), also where N is K.
    """
    N, K = stack[0].shape
    return stack[0].tensors[0].endswith("_blocks") and (N == K or shape != (len(stack), N, K))

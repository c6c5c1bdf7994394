"""One quantised matrix of a checkpoint: what it is called, its sizes, and how its tensors are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeopt.errors import CheckpointError, UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.quantized_weight import QuantizedWeight

CodeTensors = tuple[Tensor, Tensor, "Tensor | None"]
"""Codes, scales, zero points."""


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """An (N out, K in) matrix in the files; a stack of experts is one for each expert.

    Args:
        name: of the module, or of the Parameter, that the file's tensors belong to.
        expert: its number in a stacked tensor; None where the matrix has tensors of its own.
        shape: (N, K).
        format: how it is stored.
        load: reads codes, scales and zero points.
        tensors: the names of the file's tensors that hold it.
        grouped: the file's format where its columns are grouped in an order of their own (desc_act), which is no
            block: ``format`` then has a scale for each weight.
    """

    name: str
    expert: int | None
    shape: tuple[int, int]
    format: WeightFormat
    load: Callable[[], CodeTensors]
    tensors: tuple[str, ...]
    grouped: WeightFormat | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def nbytes(self) -> int:
        """Bytes of its codes, scales and zero points in the file."""
        return (self.grouped or self.format).nbytes(self.shape)

    def read(self) -> QuantizedWeight:
        """Its codes and scales; mapped memory where the file's layout is that of the format.

        Raises:
            CheckpointError: a scale or a code is no number, or the tensors do not fit.
        """
        codes, scales, zeros = self.load()
        try:
            weight = QuantizedWeight(codes, scales, zeros, self.format, self.shape)
            weight.check(self.label)
        except UsageError as err:
            raise CheckpointError(str(err) if str(err).startswith(self.label) else f"{self.label}: {err}") from err
        if codes.dtype == torch.float8_e4m3fn and (broken := codes.isnan()).any():
            row, column = broken.nonzero()[0].tolist()
            raise CheckpointError(
                f"{self.label}: the code of weight ({row}, {column}) is NaN: the checkpoint is damaged or was made of "
                "broken weights: fetch it again, or quantise it again"
            )
        return weight

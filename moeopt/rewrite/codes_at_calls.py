"""A bank of codes that is read anew for each call, whoever holds the codes: the module's buffers, or its own slots."""

from __future__ import annotations

import abc
import copy

import torch

from moeopt.ops.expert_weights import Biases
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices


class CodesReadAtCalls(QuantizedExpertWeights):
    """What the kinds of such banks share; :meth:`now` is what each of them has.

    Attributes:
        handed: this bank and its copies, by the layouts and the dtype that each is handed out with.
    """

    handed: dict[tuple[tuple[str, str], torch.dtype], CodesReadAtCalls]

    @abc.abstractmethod
    def now(self) -> QuantizedExpertWeights:
        """The bank as it is now, for one call."""

    def forget(self) -> None:
        """Leave what was kept of reads with other layouts, or with another dtype."""

    @property
    def w_in_q(self) -> tuple[QuantizedMatrices, ...]:  # type: ignore[override]  # read live
        """As the base class has it."""
        return self.now().w_in_q

    @property
    def w_out_q(self) -> QuantizedMatrices:  # type: ignore[override]
        """As the base class has it."""
        return self.now().w_out_q

    @property
    def b_in_l(self) -> tuple[Biases | None, ...]:  # type: ignore[override]
        """As the base class has it."""
        return self.now().b_in_l

    @property
    def b_out_l(self) -> Biases | None:  # type: ignore[override]
        """As the base class has it."""
        return self.now().b_out_l

    @property
    def norm_l(self) -> Biases | None:  # type: ignore[override]
        """No norm is recognised after W_out."""
        return None

    def handed_out(self, layouts: tuple[str, str], dtype: torch.dtype) -> QuantizedExpertWeights:
        """As the base class has it; read live as well, since torch.export asks while tensors have no values."""
        other = self.handed.get((layouts, dtype))
        if other is None:
            other = copy.copy(self)
            other.layouts, other.dtype = layouts, dtype
            other.forget()
            self.handed[layouts, dtype] = other
        return other

"""The rows that reach the experts of a bank on a user's data, and what rounding needs of them.

GPTQ is given a Hessian whose entries beside the diagonal are shrunk by as much as they are noise. Of n rows, columns
that have nothing to do with each other correlate by about 1 / sqrt(n) all the same, and rounding by that is worse than
none. With z the columns at mean square 1 and m_ij their correlations, the least expected error has the share

    sum over i != j of Var(m_ij)  /  sum over i != j of m_ij^2            (at most 1)

less of each m_ij (Schaefer and Strimmer 2005, target D), where Var is that of a mean of n products z_i z_j.

Shape legend: T tokens, K chosen per token, M rows of one expert, N in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec

CHUNK = 4096
"""Rows that are float64 at once."""


@dataclass(eq=False)
class ExpertRows:
    """What a bank was called with, call by call.

    Attributes:
        x: (T, N), the tokens.
        ids, weights: (T, K), the chosen experts and their routing weights.
    """

    x: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, x_TN: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One more call; ``x_TN`` may change afterwards."""
        self.x.append(x_TN.detach().clone())
        self.ids.append(ids_TK.detach())
        self.weights.append(weights_TK.detach().clone())

    def of(self, e: int, spec: ExpertsSpec) -> OneExpertsRows:
        """The rows of expert ``e``, and how much of what it makes of each is added to the output."""
        rows, shares = [], []
        for x_TN, ids_TK, weights_TK in zip(self.x, self.ids, self.weights, strict=True):
            token_M, slot_M = torch.where(ids_TK == e)
            weight_M1 = weights_TK[token_M, slot_M, None]
            on_input = spec.weight_on == "input"
            rows.append(x_TN[token_M] * weight_M1.to(x_TN.dtype) if on_input else x_TN[token_M])
            shares.append(torch.ones_like(weight_M1) if on_input else weight_M1)
        return OneExpertsRows(torch.cat(rows), torch.cat(shares))


@dataclass(frozen=True, eq=False)
class OneExpertsRows:
    """Rows (M, N) of one expert and the share (M, 1) with which each counts."""

    rows_MN: Tensor
    share_M1: Tensor

    def __len__(self) -> int:
        return len(self.rows_MN)

    def hessian(self, after: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of share^2 a a^T over the rows, ``a`` being ``after`` of a row, less what of it is noise.

        Float64, (width of a) squared; the diagonal is that of the sum. There are two rows or more.
        """
        total: Tensor | None = None
        for a_MN in self._chunks(after):
            part = a_MN.t() @ a_MN
            total = part if total is None else total.add_(part)
        assert total is not None, "there are rows"
        diagonal_N = total.diagonal().clone()
        total.mul_(1 - self._noise(after, total)).diagonal().copy_(diagonal_N)
        return total

    def _noise(self, after: Callable[[Tensor], Tensor], total_NN: Tensor) -> float:
        """The share of the correlations in ``total_NN`` that so few rows would show by chance; see the module."""
        n = len(self)
        size_N = (total_NN.diagonal() / n).sqrt()
        size_N = torch.where(size_N > 0, size_N, 1.0)
        correlations = total_NN / n / size_N / size_N[:, None]
        squares = float(correlations.square().sum() - correlations.diagonal().square().sum())
        products = 0.0  # of all pairs i != j, squared and summed over the rows
        for a_MN in self._chunks(after):
            z_MN = (a_MN / size_N).square()
            products += float(z_MN.sum(1).square().sum() - z_MN.square().sum())
        if not squares > 0:
            return 1.0
        return min(max((products - n * squares) / (n * (n - 1)) / squares, 0.0), 1.0)

    def mean_squares(self, after: Callable[[Tensor], Tensor]) -> Tensor:
        """The diagonal of :meth:`hessian` over the number of rows."""
        return torch.stack([a_MN.square().sum(0) for a_MN in self._chunks(after)]).sum(0) / len(self)

    def _chunks(self, after: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        with torch.no_grad():
            for rows, share in zip(self.rows_MN.split(CHUNK), self.share_M1.split(CHUNK), strict=True):
                yield after(rows.float()).double() * share.double()

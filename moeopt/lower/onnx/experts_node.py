"""One grouped-expert op of an exported graph: what it computes, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import RouterSpec
from moeopt.value_types import ExpertBank, ExpertFunction

DOMAIN = "moeopt"
OP = "Experts"
"""``moeopt::Experts(x, ids, weights) {site}`` stands in an exported graph until a lowering takes its place."""
ON_CODES = "ExpertsOnCodes"
"""The same operator in ONNX Runtime, on quantised weights: codes and scales in the place of each matrix."""


@dataclass
class ExpertsNode:
    """A ``moeopt::Experts`` node's meaning; shape legend: T tokens, K chosen per token, H hidden.

    Args:
        name: the block's module path with dots, like ``model.layers.0.mlp.experts``; prefixes node and weight names.
        bank: the experts' weights, ``ExpertWeights`` or a ``SlotBank``, read when a lowering is emitted, not copied.
        spec: the function, an ``ExpertsSpec`` or a ``RowFunction``.
        dtype: of ``x``, which is (T, H).
        top_k: K, the number of columns of ``ids`` (int64) and ``weights``.
        weights_dtype: of the routing weights.
        router: what computes ids and weights, where that is known.
        named: whether every id is known to name an expert; nothing need then be written for ids that do not.
    """

    name: str
    bank: ExpertBank
    spec: ExpertFunction
    dtype: torch.dtype
    top_k: int
    weights_dtype: torch.dtype
    router: RouterSpec | None = field(default=None)
    named: bool = False

    @property
    def features(self) -> int:
        """H, the width of a token."""
        if isinstance(self.spec, RowFunction):
            return self.spec.body.features
        return int(self.bank.w_in(0)[0].shape[1 if self.spec.w_in_layout == "oi" else 0])

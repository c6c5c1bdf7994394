"""One grouped-expert op of an exported graph: what it computes, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.ops.expert_weights import ExpertWeights

DOMAIN = "moeopt"
OP = "Experts"
"""``moeopt::Experts(x, ids, weights) {site}`` stands in an exported graph until a lowering takes its place."""


@dataclass
class ExpertsNode:
    """A ``moeopt::Experts`` node's meaning; shape legend: T tokens, K chosen per token, H hidden.

    Args:
        name: the block's module path with dots, like ``model.layers.0.mlp.experts``; prefixes node and weight names.
        bank: the experts' weights, read when a lowering is emitted and not copied before.
        spec: the function.
        dtype: of ``x``, which is (T, H).
        top_k: K, the number of columns of ``ids`` (int64) and ``weights``.
        weights_dtype: of the routing weights.
        router: what computes ids and weights, where that is known.
    """

    name: str
    bank: ExpertWeights
    spec: ExpertsSpec
    dtype: torch.dtype
    top_k: int
    weights_dtype: torch.dtype
    router: RouterSpec | None = field(default=None)

"""What a lowering is: it says whether it fits a site, and emits nodes that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.value_types import OnnxValue


@dataclass(frozen=True)
class Cost:
    """What one call of a lowering does, for some number of tokens; a backend turns it into seconds of its machine.

    Args:
        moved: bytes of weights and activations that are read or written.
        flops: of the matmuls.
        kernels: nodes that are started, or launches.
        memory: bytes of activations that are held at once; 0 where the runtime's memory is not planned.
        syncs: how often the host waits for sizes that the device computes.
        slowdown: times that moving and multiplying take longer than at the machine's rates.
    """

    moved: float
    flops: float
    kernels: float
    memory: float = 0.0
    syncs: float = 0.0
    slowdown: float = 1.0


class Lowering(Protocol):
    """One way to compute a grouped-expert op with a runtime's own nodes.

    Attributes:
        name: as options, manifests and reports spell it, like ``"unrolled"``.
    """

    name: str

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        """Why this lowering cannot carry the site on ``provider`` ("cpu", "cuda", ...); "" when it can."""
        ...

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        """What one call with ``tokens`` tokens does on ``provider``; asked only where :meth:`refuses` says ""."""
        ...

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        """Add nodes and initializers to the builder ``graph``; returns the value (T, H_out) that replaces the op's.

        ``x`` (T, H), ``ids`` (T, K) int64 and ``weights`` (T, K) are values of the graph.
        """
        ...

"""What a lowering is: it says whether it fits a site, and emits nodes that compute it."""

from __future__ import annotations

from typing import Any, Protocol

from moeopt.lower.onnx.experts_node import ExpertsNode


class Lowering(Protocol):
    """One way to compute a grouped-expert op with a runtime's own nodes.

    Attributes:
        name: as options, manifests and reports spell it, like ``"unrolled"``.
    """

    name: str

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        """Why this lowering cannot carry the site on ``provider`` ("cpu", "cuda", ...); "" when it can."""
        ...

    def emit(self, graph: Any, site: ExpertsNode, x: Any, ids: Any, weights: Any) -> Any:
        """Add nodes and initializers to the builder ``graph``; returns the value (T, H_out) that replaces the op's.

        ``x`` (T, H), ``ids`` (T, K) int64 and ``weights`` (T, K) are values of the graph.
        """
        ...

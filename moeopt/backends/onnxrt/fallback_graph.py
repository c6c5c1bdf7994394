"""The file of an engine's CPU fallback graph: the engine lowered for CPU, where its own provider was not there.

It may hold operators of ONNX Runtime's own, as every graph for its CPU may; ``portable=True`` is what leaves them out.
"""

from __future__ import annotations

from collections.abc import Collection

FALLBACK = "fallback.onnx"
FALLBACKS = (FALLBACK, "portable.onnx")
"""Every name that it has had: the second, in bundles of moeopt before the first."""


def fallback_among(names: Collection[str]) -> str | None:
    """The fallback graph among the names of a bundle's files."""
    return next((name for name in FALLBACKS if name in names), None)

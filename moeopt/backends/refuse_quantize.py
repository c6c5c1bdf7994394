"""What a backend says whose engines hold float experts only."""

from __future__ import annotations

from moeopt.errors import UsageError
from moeopt.options import Options


def refuse_quantize(name: str, options: Options) -> None:
    """``UsageError`` where an engine of quantised experts is asked for."""
    if options.quantize is not None:
        raise UsageError(
            f"quantize is for the backends torch and onnxruntime, and backend={name!r} builds engines of float "
            "experts: leave one of the two out"
        )

"""Optimisers of ONNX Runtime that can do nothing for a graph, and end the process on some: they are left out.

``NchwcTransformer`` lays out images for convolutions and poolings. On a graph without any, it does nothing, but in
ONNX Runtime 1.32 it reads through a null pointer where ``MatmulTransposeFusion`` has made nodes of
``MatMul(Cast(Transpose(x)), y)`` before it: the session is not made, and Python is gone.
"""

from __future__ import annotations

import mmap
import os

NCHWC = "NchwcTransformer"
_LAID_OUT = (b"Conv", b"Pool")
"""What the names of all operators hold for which that layout is: Conv, FusedConv, QLinearConv, MaxPool, ..."""
_MOST_READ = 1 << 28
"""Bytes of a graph that are looked through; one of more holds its weights, and reading them all costs seconds."""


def idle_optimizers(model: str | os.PathLike[str] | bytes, provider: str) -> list[str]:
    """The optimisers to leave out for a graph.

    Args:
        model: the path of an ``.onnx`` file, or its bytes.
        provider: what runs it; the layout is the CPU's alone.
    """
    if provider != "cpu":
        return []
    if isinstance(model, bytes):
        return [] if len(model) > _MOST_READ or any(word in model for word in _LAID_OUT) else [NCHWC]
    try:
        with open(model, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= _MOST_READ:
                return []
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
                return [] if any(held.find(word) >= 0 for word in _LAID_OUT) else [NCHWC]
    except OSError:  # the session says what is wrong with it
        return []

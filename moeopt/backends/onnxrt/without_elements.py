"""Calls with an input of no elements, over which some kernels of ONNX Runtime end the process that made them.

``GRU`` stops it and ``Einsum`` divides by a number of batches (1.32). So where a graph has such nodes, the first call
without elements in an input is tried in a process of its own, which it may end; the caller's gets an error then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.trial import ended_by
from moeopt.errors import UsageError
from moeopt.onnx_in.order import bodies
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxGraph, OnnxModel

ENDING = frozenset(("Einsum", "GRU", "LSTM", "RNN"))
"""Operators with such kernels."""


class CallsWithoutElements:
    """Which calls of a graph end a process; each kind of call is tried once.

    Args:
        graph: the file; its weights lie beside it.
    """

    def __init__(self, graph: Path) -> None:
        self._path = graph
        self._model: OnnxModel | None = None
        self._survived: set[frozenset[tuple[str, int]]] = set()

    def check(self, feeds: Mapping[str, Tensor]) -> None:
        """Raise ``UsageError`` where ``feeds`` would end this process."""
        if all(value.numel() for value in feeds.values()):
            return
        kind = frozenset((name, axis) for name, t in feeds.items() for axis, size in enumerate(t.shape) if not size)
        if kind in self._survived:
            return
        signal = ended_by(self._read(), self._path.parent, feeds) if _operators(self._read().graph) & ENDING else None
        if signal is not None:
            sizes = ", ".join(f"{shown_line(name)} {tuple(value.shape)}" for name, value in feeds.items())
            raise UsageError(
                f"ONNX Runtime {runtime().__version__} ends the process that runs this graph on these sizes (signal "
                f"{signal}, in a process of its own): {sizes}; answer a call without elements without the engine"
            )
        self._survived.add(kind)

    def _read(self) -> OnnxModel:
        import onnx

        if self._model is None:
            self._model = onnx.load(str(self._path), load_external_data=False)
        return self._model


def _operators(graph: OnnxGraph) -> set[str]:
    inner = (_operators(body) for node in graph.node for body in bodies(node))
    return {node.op_type for node in graph.node}.union(*inner)

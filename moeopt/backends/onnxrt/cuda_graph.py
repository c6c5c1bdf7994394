"""Runs of a session from CUDA graphs that ONNX Runtime captured: one graph for each set of input shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from moeopt.backends.onnxrt.bound import BoundTensors
from moeopt.backends.onnxrt.stream import SessionStream
from moeopt.errors import UsageError
from moeopt.value_types import OrtObject

CUDA_GRAPH = "moeopt.cuda_graph"
"""The entry of a session's configuration that asks for CUDA graphs: "1"."""

GRAPHS = 8
"""Sets of input shapes that are captured; ONNX Runtime frees none of its graphs, and each holds its memory."""

_ID, _NO_CAPTURE = "gpu_graph_id", "-1"

Run = Callable[[OrtObject, OrtObject], None]
"""Runs a binding with run options."""


def asks_for_graphs(options: OrtObject, provider: str) -> bool:
    """Whether an ``onnxruntime.SessionOptions`` has :data:`CUDA_GRAPH`.

    Raises:
        UsageError: it has, and ``provider`` is another than "cuda".
    """
    try:
        said = options.get_session_config_entry(CUDA_GRAPH)
    except Exception:  # ONNX Runtime's own, where the entry was not set
        return False
    if said not in ("0", "1"):
        raise UsageError(f'session_options: {CUDA_GRAPH} is "0" or "1", not {said!r}')
    if said == "1" and provider != "cuda":
        raise UsageError(f"session_options ask for {CUDA_GRAPH}, which is for the provider cuda; this is {provider}")
    return bool(said == "1")


class _Captured:
    """The buffers whose addresses one graph has, and the number that ONNX Runtime knows the graph by."""

    def __init__(self, session: OrtObject, number: int, inputs: Mapping[str, torch.Tensor]) -> None:
        self.bound, self.number = BoundTensors(session), str(number)
        self.inputs = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
        self.outputs: list[torch.Tensor] = []
        for name, buffer in self.inputs.items():
            self.bound.bind_input(name, buffer)


class GraphRuns:
    """The first run of a set of shapes is a plain one, and tells what the outputs are like; the second is captured,
    the rest replay it: inputs are copied into the graph's buffers, outputs out of them.

    Args:
        session: an ``InferenceSession`` with ``enable_cuda_graph``.
        stream: its stream, on which the buffers are written and read too, whichever thread calls.
        names: its outputs; ``is_bool``: which of them are booleans.
        run_options: makes an ``onnxruntime.RunOptions``.
    """

    def __init__(
        self,
        session: OrtObject,
        stream: SessionStream,
        names: Sequence[str],
        is_bool: Sequence[bool],
        run_options: Callable[[], OrtObject],
    ) -> None:
        self._session, self._stream, self._run_options = session, stream, run_options
        self._names, self._is_bool = names, is_bool
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, torch.Tensor], device: torch.device, run: Run) -> list[torch.Tensor]:
        """The outputs, on memory of their own. ``inputs`` are contiguous; those on the CPU are copied to ``device``."""
        key = tuple((name, tensor.dtype, tensor.shape) for name, tensor in inputs.items())
        with self._lock, self._stream.entered() as caller:
            known = self._captured.get(key)
            if known is None:
                return self._first(
                    key, {n: t if t.device == device else t.to(device) for n, t in inputs.items()}, device, run
                )
            for name, buffer in known.inputs.items():
                buffer.copy_(inputs[name])
            run(known.bound.binding, self._numbered(known.number))
            outputs = [buffer.clone() for buffer in known.outputs]
            for output in outputs:
                output.record_stream(caller)
            return outputs

    def _first(
        self, key: tuple[object, ...], inputs: Mapping[str, torch.Tensor], device: torch.device, run: Run
    ) -> list[torch.Tensor]:
        bound = BoundTensors(self._session)
        held = [bound.bind_input(name, tensor) for name, tensor in inputs.items()]
        bound.free_outputs(self._names, device)
        run(bound.binding, self._numbered(_NO_CAPTURE))
        del held
        outputs = bound.outputs(self._is_bool)
        full = all(t.numel() for t in (*inputs.values(), *outputs))  # an empty tensor has no address to capture
        if full and key not in self._captured and len(self._captured) < GRAPHS:
            made = _Captured(self._session, len(self._captured) + 1, inputs)
            made.outputs = [torch.empty_like(output) for output in outputs]
            for name, buffer in zip(self._names, made.outputs, strict=True):
                made.bound.bind_output(name, buffer)
            self._captured[key] = made
        return outputs

    def _numbered(self, number: str) -> OrtObject:
        options = self._run_options()
        options.add_run_config_entry(_ID, number)
        return options

"""``optimize`` of an ONNX model."""

from __future__ import annotations

import dataclasses

from moeopt.backends.choice import checked_choice
from moeopt.errors import UsageError
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.progress import shown
from moeopt.value_types import PyObject


def optimize_file(model: PyObject, inputs: PyObject, backend: str, options: Options) -> Optimized:
    """The model with its blocks replaced in its own graph."""
    chosen, runtime, plan = checked_choice(backend, options)
    if chosen.dtype is not None or chosen.inplace:
        raise UsageError("an ONNX file keeps its dtype and is not written to: leave out dtype= and inplace=")
    if chosen.quantize is not None:
        raise UsageError(
            "the experts of an ONNX file keep their format: leave out quantize=, or quantise the PyTorch model, or "
            "moeopt.from_onnx(path), with backend='onnxruntime'"
        )
    with shown(chosen.progress) as say:
        made, call = runtime.optimize_file(model, inputs, dataclasses.replace(chosen, progress=say), plan)
    return Optimized(made, call)

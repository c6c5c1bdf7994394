"""``moeopt.from_onnx``: an ONNX file as an ``nn.Module``, held against ONNX Runtime before it is given out."""

from __future__ import annotations

import importlib.util

from moeopt.errors import Declined, UsageError
from moeopt.onnx_in.read import OnnxFile, read_onnx
from moeopt.onnx_in.unroll import unrolled
from moeopt.onnx_in.whole_file import InterpretedFile, interpreted
from moeopt.value_types import PyObject


def from_onnx(model: PyObject, inputs: PyObject = None) -> InterpretedFile:
    """An ONNX model as an ``nn.Module`` in eval mode that computes what its graph computes.

    Blocks that may be experts are children, at paths like ``model.layers.0.mlp``, so that ``moeopt.optimize``,
    ``inspect`` and ``profile`` take the module as any other. Its parameters are the file's mapped bytes, which nothing
    may write to. Where ONNX Runtime is installed, both run once on the example inputs, and the module once in float64.

    Args:
        model: the path of a ``.onnx`` file, an ``onnx.ModelProto`` or an ``onnx_ir.Model``, of opset 13 or newer.
        inputs: of the graph, in the forms of ``moeopt.optimize``; None: some are made up, to tell sizes from constants.

    Raises:
        UsageError: the file is damaged, or holds an operator or a body that the interpreter does not run (the message
            names the node); or ONNX Runtime gives other numbers than rounding explains.
    """
    file = read_onnx(model)
    made = interpreted(unrolled(file), inputs)
    if made.example and importlib.util.find_spec("onnxruntime") is not None:
        _compare(file, made)
    return made


def _compare(file: OnnxFile, made: InterpretedFile) -> None:
    from moeopt.backends.onnxrt.onnx_file.original import session_on  # it needs ONNX Runtime
    from moeopt.backends.onnxrt.onnx_file.parts import explained_distance

    session = session_on(file.proto, file.directory, file.name)
    try:
        explained_distance(made, [made.example[name] for name in made.names], session.run(made.example))
    except Declined as err:
        raise UsageError(f"{file.name} has no form as a module: {err.reason}") from None

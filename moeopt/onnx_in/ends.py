"""The ends of a graph: the inputs that a caller gives, and their types."""

from __future__ import annotations

import math
from typing import Any

import torch

from moeopt.errors import UsageError
from moeopt.onnx_in.read import OnnxFile
from moeopt.untrusted import shown_line
from moeopt.value_types import OnnxGraph, OnnxValue

MOST_ELEMENTS = 1 << 30
"""Of an input of fixed sizes."""


def graph_inputs(graph: OnnxGraph) -> list[Any]:
    """The inputs of a protobuf graph that a caller gives: those that no initializer stands for."""
    held = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in held]


def tensor_type(file: OnnxFile, value: OnnxValue) -> tuple[torch.dtype, list[Any]]:
    """The dtype and the sizes of an end of a graph: numbers, names, or None where nothing is said.

    Raises:
        UsageError: it is a sequence, an optional value, text, or of no rank.
    """
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import to_torch_dtype

    name = shown_line(value.name)
    kind = value.type.WhichOneof("value")
    if kind is None:
        raise UsageError(
            f"{file.name}: {name!r} has no type, and the ends of a graph need one: save what "
            "onnx.shape_inference.infer_shapes makes of the model, or name the element type where the value is declared"
        )
    if kind != "tensor_type":
        raise UsageError(f"{file.name}: {name!r} is a {kind}, and moeopt takes tensors only")
    tensor = value.type.tensor_type
    try:
        dtype = to_torch_dtype(ir.DataType(tensor.elem_type))
    except (TypeError, ValueError):
        raise UsageError(
            f"{file.name}: {name!r} holds {_type_name(tensor.elem_type)}, an element type that torch lacks: moeopt "
            "takes graphs whose inputs and outputs are numbers"
        ) from None
    dims = [d.dim_value if d.HasField("dim_value") else _named(d.dim_param) for d in tensor.shape.dim]
    fixed = [d for d in dims if isinstance(d, int)]
    if any(d < 0 for d in fixed) or math.prod(fixed) > MOST_ELEMENTS:
        raise UsageError(
            f"{file.name}: {name!r} has the shape {[shown_line(str(d)) for d in dims][:8]}, and no tensor of more than "
            f"{MOST_ELEMENTS} elements is run: it was damaged, or export the model for smaller inputs"
        )
    return dtype, dims


def _named(dimension: str) -> int | str | None:
    """What a size is called; transformers' exporter calls the fixed ones by their numbers."""
    return int(dimension) if dimension.isascii() and dimension.isdigit() and len(dimension) < 10 else dimension or None


def _type_name(number: int) -> str:
    """What ONNX calls an element type; its number where there is none of that number."""
    import onnx

    known: dict[int, str] = {value: name for name, value in onnx.TensorProto.DataType.items()}
    return known.get(number, f"the element type {number}")

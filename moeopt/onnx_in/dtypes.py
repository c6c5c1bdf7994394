"""ONNX element types as torch's."""

from __future__ import annotations

import torch

from moeopt.errors import Declined
from moeopt.value_types import PyObject

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def torch_dtype(number: PyObject, where: str) -> torch.dtype:
    """The dtype of an ``onnx.TensorProto.DataType`` or an ``onnx_ir.DataType``.

    Raises:
        Declined: torch has none, ``where`` says of what.
    """
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import to_torch_dtype

    try:
        found: torch.dtype = to_torch_dtype(ir.DataType(number))
    except (TypeError, ValueError):
        raise Declined(f"{where} is of the element type {number}, which torch does not have") from None
    return found

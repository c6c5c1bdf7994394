"""Tensors and attributes of ``onnx_ir`` as torch's and Python's values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeopt.errors import Declined
from moeopt.onnx_in.dtypes import torch_dtype
from moeopt.patches import no_warnings
from moeopt.value_types import OnnxNode, OnnxValue, PyObject


def constant_of(node: OnnxNode) -> Tensor:
    """The tensor that a ``Constant`` node holds."""
    (attribute,) = node.attributes.values()
    value = attribute_value(attribute, node.name)
    if isinstance(value, Tensor):
        return value
    dtype = torch.float32 if "float" in attribute.name else torch.int64
    if isinstance(value, (str, bytes)) or "string" in attribute.name:
        raise Declined(f"the node {node.name!r} holds text, which torch does not have")
    return torch.tensor(value, dtype=dtype)


def attribute_value(attribute: OnnxValue, where: str) -> PyObject:
    """An attribute of ``onnx_ir`` as a Python value or a tensor."""
    import onnx_ir as ir

    kinds = ir.AttributeType
    if attribute.type == kinds.TENSOR:
        return tensor_of(attribute.value, where)
    if attribute.type in (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.STRINGS):
        value = attribute.value
        return list(value) if isinstance(value, (tuple, list)) else value
    raise Declined(f"the node {where!r} has the attribute {attribute.name!r} of a kind that moeopt does not read")


def _mapped(value: OnnxValue) -> PyObject:
    """The bytes of a tensor in its file, mapped; onnx_ir itself reads no file that has two names (a hard link)."""
    shape = tuple(int(n) for n in value.shape)
    if 0 in shape:
        return np.empty(shape, value.dtype.numpy())
    return np.memmap(value.path, value.dtype.numpy(), "r", value.offset or 0, shape)


def tensor_of(value: OnnxValue, where: str) -> Tensor:
    """A tensor of ``onnx_ir`` as torch's, in the same bytes where they are mapped from a file; 4 bits become 8.

    Raises:
        Declined: torch has no such element type, or what it holds is not numbers.
    """
    import onnx_ir as ir

    if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        return torch.from_numpy(value.numpy().astype("int8" if value.dtype == ir.DataType.INT4 else "uint8"))
    dtype = torch_dtype(value.dtype, f"the tensor {value.name or where!r}")
    array = _mapped(value) if isinstance(value, ir.ExternalTensor) and value.dtype.bitwidth >= 8 else value.numpy()
    if dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        array = array.view("int16" if dtype == torch.bfloat16 else "uint8")
    with no_warnings():  # mapped bytes are read-only, and nothing writes to a constant
        found = torch.from_numpy(array)
    return found if found.dtype == dtype else found.view(dtype)

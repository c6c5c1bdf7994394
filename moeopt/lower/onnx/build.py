"""Nodes and weights of one site, named after it, on the way into an exported graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moeopt.value_types import OnnxAttribute, OnnxValue, PyObject


class Builder:
    """Collects the nodes and initializers of one site; every name begins with the site's.

    Attributes:
        nodes: ``onnx_ir`` nodes in order.
        initializers: ``onnx_ir`` values with their tensors; a weight's tensor is read when the model is written.
        domains: operator domains used beside ONNX's own, with their versions.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.domains: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[Any],
        *,
        name: str = "",
        outputs: int = 1,
        domain: str = "",
        version: int = 1,
        **attributes: OnnxAttribute,
    ) -> OnnxValue:
        """Add a node; returns its value, or a tuple of ``outputs`` values."""
        import onnx_ir as ir

        label = self._name(name or op_type)
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=label)
        for number, value in enumerate(node.outputs):
            value.name = label if outputs == 1 else f"{label}.{number}"
        if domain:
            self.domains[domain] = version
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def const(self, value: OnnxValue, dtype: PyObject = None, name: str = "const") -> OnnxValue:
        """A small constant, made once for equal values."""
        import onnx_ir as ir

        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(self._name(name), ir.tensor(array))
        return self._constants[key]

    def weight(
        self, name: str, read: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int]
    ) -> OnnxValue:
        """A weight whose tensor is made by ``read`` when it is needed, and not kept."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

        label = self._name(name)
        lazy = ir.LazyTensor(
            lambda: TorchTensor(read().detach().contiguous().cpu(), name=label),
            dtype=from_torch_dtype(dtype),
            shape=ir.Shape(list(shape)),
            name=label,
        )
        return self._initializer(label, lazy)

    def initializer(self, name: str, tensor: OnnxValue) -> OnnxValue:
        """A value that holds ``tensor``, an ``onnx_ir`` one, under a name of the site's own."""
        return self._initializer(self._name(name), tensor)

    def _initializer(self, name: str, tensor: OnnxValue) -> OnnxValue:
        import onnx_ir as ir

        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers.append(value)
        return value

    def _name(self, name: str) -> str:
        full = f"{self.prefix}/{name}"
        number = self._taken.get(full, 0)
        self._taken[full] = number + 1
        return f"{full}_{number}" if number else full

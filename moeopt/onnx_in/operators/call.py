"""One node as its operator's function sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeopt.onnx_in.values import GraphValue, SizeValue, numbers, tensor
from moeopt.value_types import PyObject


@dataclass
class NodeCall:
    """The inputs and attributes of one node in one run.

    Attributes:
        node: its name and operator, for messages.
        inputs: its values; None for one that is left out.
        attributes: as Python values.
        outputs: how many results it has.
        opset: the version of its domain.
        run: what runs a body (an attribute that is a graph) with the values of its inputs.
    """

    node: str
    inputs: Sequence[Any]
    attributes: Mapping[str, Any]
    outputs: int = 1
    opset: int = 20
    run: Callable[[Any, Sequence[GraphValue]], list[GraphValue]] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.inputs)

    def get(self, number: int) -> PyObject:
        """An input, or None."""
        return self.inputs[number] if number < len(self.inputs) else None

    def tensor(self, number: int) -> Tensor:
        """An input that must be there, as a tensor."""
        return tensor(self.inputs[number])

    def operand(self, number: int) -> PyObject:
        """An input as a tensor, or as a number where it is one constant that widens nothing."""
        value = self.inputs[number]
        if not isinstance(value, SizeValue) or value.number is None:
            return tensor(value)
        others = [v for n, v in enumerate(self.inputs) if n != number and isinstance(v, Tensor)]
        widens = [o.dim() < value.array.ndim or o.is_floating_point() != value.dtype.is_floating_point for o in others]
        fits = bool(others) and not any(widens)  # in float64, as the oracle runs, too
        return value.number if fits else tensor(value)

    def optional(self, number: int) -> Tensor | None:
        """An input as a tensor, or None."""
        value = self.get(number)
        return None if value is None else tensor(value)

    def numbers(self, number: int) -> list[Any]:
        """An input that is a list of sizes or axes."""
        return numbers(self.inputs[number])

    def axes(self, number: int, default: PyObject = None) -> PyObject:
        """Axes, which are an input in newer opsets and an attribute in older ones."""
        if self.get(number) is not None:
            return [int(n) for n in self.numbers(number)]
        return self.attributes.get("axes", default)

    def attribute(self, name: str, default: PyObject = None) -> PyObject:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

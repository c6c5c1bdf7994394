"""New steps between those of a region, with names that nothing else has, and constants that are parts of others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeopt.onnx_in.free_names import FreeNames
from moeopt.onnx_in.program import NodeStep
from moeopt.value_types import PyObject


class StepWriter:
    """Collects steps.

    Args:
        given: the steps that there are.
        constants: theirs, by name; new ones are added.
        shapes: of the values that they read and make, on one call.

    Attributes:
        steps: what was written.
    """

    def __init__(
        self, given: Sequence[NodeStep], constants: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.constants, self.shapes = constants, shapes
        self.steps: list[NodeStep] = []
        self._names = FreeNames([*constants, *shapes, *(n for s in given for n in (*s.inputs, *s.outputs))])
        self._held: dict[Hashable, str] = {}

    def new(self, op_type: str, *inputs: str, **attributes: PyObject) -> str:
        """The name of what a new step of one result gives."""
        name = self._names.new(f"apart.{op_type}")
        self.write(op_type, inputs, name, **attributes)
        return name

    def write(self, op_type: str, inputs: Sequence[str], result: str, **attributes: PyObject) -> None:
        """A new step that gives ``result``."""
        self.steps.append(NodeStep("", op_type, "", tuple(inputs), (result,), attributes))

    def like(self, step: NodeStep, inputs: Sequence[str], **attributes: PyObject) -> str:
        """The name of what a step gives of other inputs."""
        name = self._names.new(f"{step.outputs[0]}.part")
        both = {**step.attributes, **attributes}
        self.steps.append(replace(step, inputs=tuple(inputs), outputs=(name,), attributes=both))
        return name

    def sum(self, names: Sequence[str], result: str = "") -> str:
        """The name of the sum of several values: ``result`` where that is given."""
        total = names[0]
        for number, name in enumerate(names[1:], 2):
            made = result if result and number == len(names) else self._names.new("apart.sum")
            self.write("Add", (total, name), made)
            total = made
        return total

    def pick(self, name: str, axis: int, place: int) -> str:
        """One place of an axis; the value itself where there is no such axis (-1)."""
        return name if axis < 0 else self.new("Gather", name, self.number(place), axis=axis)

    def with_axes(self, name: str, axes: Sequence[int]) -> str:
        """A value with axes of the length 1 at these places of the result."""
        return self.new("Unsqueeze", name, self.number(list(axes))) if axes else name

    def number(self, value: int | list[int]) -> str:
        """A constant of whole numbers."""
        name = self._names.new("apart.number")
        self.constants[name] = torch.tensor(value)
        return name

    def matrix(self, stack: str, expert: int, turned: bool = False) -> str:
        """The constant that is one matrix of a stack, where it lies."""
        held = self.constants[stack]
        own = (held.squeeze(0) if held.shape[0] == 1 and held.dim() > 3 else held)[expert]
        return self._part(f"{stack}.{expert}", turned, own.transpose(-1, -2) if turned else own)

    def place(self, name: str, axis: int, place: int) -> str:
        """The constant that is one place of another's axis."""
        return self._part(f"{name}.{place}", (axis,), self.constants[name].select(axis, place))

    def cut(self, name: str, axis: int, parts: int, part: int) -> str | None:
        """The constant that is one of ``parts`` as long of another's axis; None where that cannot be divided so."""
        held = self.constants[name]
        if not held.dim() or held.shape[axis] % parts:
            return None
        width = held.shape[axis] // parts
        return self._part(f"{name}.{part}", (axis, parts), held.narrow(axis, part * width, width))

    def _part(self, stem: str, how: Hashable, held: Tensor) -> str:
        """The name of a part of a constant, the same each time that this part is asked for. A file may have constants
        that are called as the part would be (``experts.0`` beside ``experts``): those are others."""
        which = stem, how
        if which not in self._held:
            name = self._held[which] = self._names.new(stem)
            self.constants[name] = held
        return self._held[which]

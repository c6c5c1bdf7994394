"""The steps that stay of one recorded call, as values: inputs, attributes, calls of ops and of submodules, experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moeopt.errors import Declined
from moeopt.value_types import FxArg, FxTarget, PyObject


@dataclass(frozen=True)
class StepRef:
    """The result of an earlier step."""

    step: int


@dataclass
class KeptStep:
    """One step. ``kind``: input, attr, constant, call, module or experts.

    ``shape`` and ``dtype`` are those of its result where it is one tensor and they are known, else None.
    """

    kind: str
    target: FxTarget
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    shape: tuple[Any, ...] | None = field(default=None, compare=False)
    dtype: torch.dtype | None = field(default=None, compare=False)


@dataclass
class KeptSteps:
    """Steps in order; ``output``, ``mutations`` and ``attributes`` are trees of :class:`StepRef`.

    An attribute may be ``UNSET`` (see ``moeopt.rewrite.scratch``).
    """

    steps: list[KeptStep]
    output: FxArg
    mutations: list[tuple[StepRef, StepRef]]
    attributes: dict[tuple[str, str], Any]
    kept_modules: list[str]

    def call(self, target: FxTarget, *args: PyObject, source: str = "", **kwargs: PyObject) -> StepRef:
        """Append a call of ``target`` and return its result."""
        return self.add(KeptStep("call", target, args, kwargs, source))

    def note(self, ref: StepRef, shape: Sequence[int] | None, dtype: torch.dtype | None) -> StepRef:
        """Write down the shape and dtype of the result ``ref``, which is returned."""
        step = self.steps[ref.step]
        if shape is not None and step.shape is None:
            step.shape, step.dtype = tuple(shape), dtype
        return ref

    def add(self, step: KeptStep) -> StepRef:
        """Append a step and return its result."""
        self.steps.append(step)
        return StepRef(len(self.steps) - 1)


class ChangesOutside(Declined):
    """Calls of a block became other steps."""

    may_tell = False  # more rows: the calls of few were read

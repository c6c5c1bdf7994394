"""Calls of torch that a recording must see before PyTorch turns them into ATen calls, or into none."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from moeopt.value_types import FxArg, FxTarget, PyObject

aten = torch.ops.aten


class CallRecorder(Protocol):
    """What such calls are reported to: the recorder of :mod:`moeopt.capture.tape`."""

    @property
    def open(self) -> bool:
        """Whether what runs now is written down."""
        ...

    def left_the_tape(self, t: torch.Tensor) -> None:
        """``t`` was turned into Python numbers or an array."""
        ...

    def record_whole(self, func: FxTarget, args: tuple[Any, ...]) -> torch.Tensor:
        """Write ``func`` down as one node and return its result."""
        ...


def _distances(
    x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> tuple[torch.Tensor, torch.Tensor, float, int | None]:
    """The arguments of ``aten.cdist`` for those of ``torch.cdist``."""
    modes = {
        "use_mm_for_euclid_dist_if_necessary": None,
        "use_mm_for_euclid_dist": 1,
        "donot_use_mm_for_euclid_dist": 2,
    }
    return x1, x2, float(p), modes[compute_mode]


def _without_dimension(
    input: torch.Tensor, other: torch.Tensor, dim: int | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The arguments of ``aten.cross`` for those of ``torch.cross``; None where the code tells its dimension."""
    return (input, other) if dim is None and out is None else None


def _wrapped(arg: FxArg) -> bool:
    """True for what ``vmap`` and its like put in the place of a tensor."""
    return isinstance(arg, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(arg)


class WatchCalls(TorchFunctionMode):
    """Notices ``.tolist()``, ``.numpy()`` and ``np.asarray``, which leave no trace on the tape, and what depends on the
    number of rows: ``torch.cdist``, for which PyTorch runs a product of matrices or not, and ``torch.cross`` without a
    dimension, which takes the first one of size 3, and so that of the rows where there are 3."""

    def __init__(self, recorder: CallRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        if func in _LEAVES_TAPE:
            self.recorder.left_the_tape(args[0])
        if self.recorder.open and not any(map(_wrapped, args)):
            if func is torch.cdist:
                return self.recorder.record_whole(aten.cdist.default, _distances(*args, **(kwargs or {})))
            if func in _CROSSES and (vectors := _without_dimension(*args, **(kwargs or {}))):
                return self.recorder.record_whole(aten.cross.default, vectors)
        return func(*args, **(kwargs or {}))


_CROSSES = {torch.cross, torch.Tensor.cross}
_LEAVES_TAPE = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}

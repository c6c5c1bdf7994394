"""Run a module once and leave it as it was, without a tape.

What :func:`moeopt.capture.tape.record` costs is the tape. Where only the run itself matters (hooks that collect
what modules are called with, a first call before a second) the writes alone are watched and undone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.failed_call import call_hint, in_short
from moeopt.capture.functional import may_write, mutated_args, unsaid_writes
from moeopt.capture.module_state import ModuleState
from moeopt.capture.tape import clone_inputs
from moeopt.errors import CaptureError
from moeopt.value_types import FxTarget, PyObject


class WatchWrites(TorchDispatchMode):
    """Calls ``about_to_write`` with each tensor that an op is about to write."""

    supports_higher_order_operators = True

    def __init__(self, about_to_write: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._about_to_write = about_to_write

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        if may_write(func):
            for tensor in (*mutated_args(func, args, kwargs or {}), *unsaid_writes(func, args)):
                if tensor.layout == torch.strided:
                    self._about_to_write(tensor)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def undone(module: nn.Module) -> Iterator[TorchDispatchMode]:
    """Under ``no_grad``; afterwards the module and the random stream are as before.

    Gives the mode under which the module must be called, so that writes to its tensors are seen.
    """
    state, rng = ModuleState(module), torch.get_rng_state()
    try:
        with torch.no_grad():
            yield WatchWrites(state.about_to_write)
    finally:
        state.restore()
        torch.set_rng_state(rng)


def run_quietly(module: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> PyObject:
    """What ``module(*args, **kwargs)`` returns; see :func:`undone`.

    Raises:
        CaptureError: the module raised.
    """
    args, kwargs = clone_inputs((tuple(args), dict(kwargs or {})))
    with undone(module) as watched:
        try:
            with watched:
                return module(*args, **kwargs)
        except Exception as err:
            raise CaptureError(
                f"{type(module).__name__} raised {in_short(err)}; "
                f"check that it runs on these inputs in eager mode{call_hint(module, args, kwargs)}"
            ) from err

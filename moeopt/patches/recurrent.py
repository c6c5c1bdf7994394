"""The patch of the check that torch's recurrent layers make of their input's dtype, for runs in float64."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

from moeopt.patches.patch import InForce, Mine, Patch, Undo, replace
from moeopt.value_types import PyObject

_any = Mine()


def _check_sizes_alone() -> Undo:
    from torch import nn

    def make(theirs: PyObject, in_force: InForce) -> PyObject:
        def check_input(self: PyObject, input: PyObject, batch_sizes: PyObject) -> None:
            if in_force.yes and _any.top is not None:
                input = types.SimpleNamespace(dtype=self._flat_weights[0].dtype, dim=input.dim, size=input.size)
            theirs(self, input, batch_sizes)

        return check_input

    return replace(nn.RNNBase, "check_input", make)


_checked = Patch(_check_sizes_alone)


@contextlib.contextmanager
def recurrent_inputs_of_any_dtype() -> Iterator[None]:
    """While open, ``nn.GRU`` and its like take inputs of this thread that are wider than their weights: who opens it
    widens the weights. Sizes are checked as ever."""
    with _checked(), _any.holding(True):
        yield

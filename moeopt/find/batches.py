"""The data that something is measured on: one call's inputs, or any iterable of such."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import UsageError
from moeopt.find.example_inputs import as_call
from moeopt.value_types import PyObject


def batches(data: PyObject, purpose: str = "profile", name: str = "data") -> Iterator[ArgsKwargs]:
    """Calls, one after the other; nothing is read ahead.

    A tensor, a tuple and a mapping are one call, as ``optimize`` takes them. Anything else that can be iterated (a
    list, a generator, a DataLoader) yields calls in these forms; there a list is one call's positional arguments.
    ``purpose``: what is done with them, for the message about none; ``name``: what messages call them.

    Raises:
        UsageError: ``data`` is none of these, an item is no call, or there is none.
    """
    if isinstance(data, (torch.Tensor, tuple, Mapping)):
        yield as_call(data)
        return
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise UsageError(
            f"{name} is a {type(data).__name__}; give one call's inputs (a tensor, a tuple of positional arguments, a "
            "dict of keyword arguments) or an iterable of such"
        )
    number = -1
    for number, item in enumerate(data):
        try:
            yield as_call(item)
        except UsageError as err:
            raise UsageError(f"batch {number} of {'the data' if name == 'data' else name}: {err}") from None
    if number < 0:
        raise UsageError(f"{name} yields no batch: there is nothing to {purpose}")

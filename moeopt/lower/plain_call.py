"""A call as exporters can take it: tensors of their own, and structures whose parts they see.

``torch.export`` writes down what it meets in a tensor: its strides, the base that it is a view of, that it wants
gradients. None of this is in a graph, and a guard on a view's base is one that torch's own code then cannot run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.capture.tree import ArgsKwargs
from moeopt.value_types import PyObject


def plain_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgsKwargs:
    """The call with the same values in contiguous memory of their own: no views, no strides, no gradients, and no
    tensors of inference mode. An argument that is given twice is two arguments."""

    def own(t: torch.Tensor) -> torch.Tensor:
        if t.layout != torch.strided or type(t) not in (torch.Tensor, torch.nn.Parameter):
            return t
        with torch.inference_mode(False), torch.no_grad():
            return t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)

    call: ArgsKwargs = pytree.tree_map_only(torch.Tensor, own, (tuple(args), dict(kwargs)))
    return call


@contextlib.contextmanager
def open_dataclasses(call: ArgsKwargs) -> Iterator[None]:
    """While open, exporters see the fields of the dataclasses among a call's arguments.

    Their owner may have registered a class with torch; this does not do so for good, for it would change what the
    owner's other code makes of the class.
    """
    held: set[Any] = {type(v) for v in _values(call) if dataclasses.is_dataclass(v) and not isinstance(v, type)}
    new = [cls for cls in held if cls not in pytree.SUPPORTED_NODES]
    opened = []
    for cls in new:
        with contextlib.suppress(ValueError):  # one that its fields do not make: its argument is what export names
            torch.export.register_dataclass(cls)
            opened.append(cls)
    try:
        yield
    finally:
        for cls in opened:
            pytree._deregister_pytree_node(cls)


def _values(tree: PyObject) -> Iterator[Any]:
    """Every value on the way to the leaves, dataclasses in containers among them."""
    yield tree
    if isinstance(tree, dict):
        parts = list(tree.values())
    elif isinstance(tree, (list, tuple)):
        parts = list(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = [getattr(tree, field.name, None) for field in dataclasses.fields(tree)]
    else:
        return
    for part in parts:
        yield from _values(part)


def free_sizes(tree: PyObject, ones: int) -> PyObject:
    """The ``dynamic_shapes`` of a call whose sizes are all free; sizes of 1 only in the first ``ones`` dimensions.

    torch wants the shapes of a dataclass as a list.
    """
    if isinstance(tree, torch.Tensor):
        free = (d for d, size in enumerate(tree.shape) if size != 1 or d < ones)
        return dict.fromkeys(free, torch.export.Dim.AUTO)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, dict)):
        fields = (getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init)
        return [free_sizes(value, ones) for value in fields if value is not None]
    if type(tree) is dict:
        return {key: free_sizes(value, ones) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(free_sizes(value, ones) for value in tree)
    return pytree.tree_map(lambda leaf: free_sizes(leaf, ones) if isinstance(leaf, torch.Tensor) else None, tree)

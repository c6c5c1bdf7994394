"""A module that the model calls several times, each time with another plain value (a task, a number of a layer).

    [self.moe(x, task) for task in range(3)]

A rewritten block stands for one of the values: its guard sends calls with others to the block's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import fx, nn

from moeopt.capture.tape import Call
from moeopt.capture.tree import ArgsKwargs, tree_map
from moeopt.errors import Declined
from moeopt.pipeline.block_capture import original_forward
from moeopt.rewrite.call_guard import TENSOR, bind
from moeopt.value_types import PyObject

_VALUES = (bool, int, float, str, type(None))


def refuse_other_values(module: nn.Module, known: ArgsKwargs, calls: Iterable[Call]) -> None:
    """``Declined`` where one of the ``calls`` of ``module`` has a plain value that the ``known`` one has not."""
    signature = inspect.signature(original_forward(module))
    for call in calls:
        try:
            ours, theirs = (bind(signature, *_marked(one)).leaves() for one in (known, (call.args, call.kwargs)))
        except TypeError:  # its forward is wrapped, and takes other arguments than its signature says
            continue
        for a, b in zip(ours, theirs, strict=False):
            if isinstance(a, _VALUES) and isinstance(b, _VALUES) and (type(a) is not type(b) or a != b):
                raise Declined(
                    f"the model calls it with {b!r} here and with {a!r} elsewhere, and rewritten code holds for one "
                    "such value; give each value a module of its own that holds the same experts, or pass a tensor "
                    "(by which index_select picks the router of a task)"
                )


def _marked(call: ArgsKwargs) -> ArgsKwargs:
    """The arguments with a mark for each tensor, and for each node that stands for one."""

    def mark(_: PyObject) -> PyObject:
        return TENSOR

    marked: ArgsKwargs = tree_map(fx.Node, mark, tree_map(torch.Tensor, mark, call))
    return marked

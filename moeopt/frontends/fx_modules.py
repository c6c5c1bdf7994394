"""FX in, FX out: a model through the passes, as one ``fx.GraphModule`` on the same weights.

A GraphModule whose own graph still stands (nothing was rewritten, or only modules that it calls) comes back as it is.
Anything else is exported: routers, what is around the blocks, and a ``torch.ops.moeopt.experts`` node for each group
of experts, in one graph. The data-dependent loop is gone by then, so ``torch.export`` takes what it refused before.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from moeopt.api import optimize
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import NotSaveableError, UsageError
from moeopt.lower.export import export_program
from moeopt.lower.size_one import avoid_size_one, export_widened
from moeopt.onnx_in.read import is_onnx
from moeopt.passes.base import Pass, PassRecord
from moeopt.rewrite.install import rewritten_forward
from moeopt.value_types import PyObject

_OF_OPTIMIZE = {"backend", "out", "task", "trust_remote_code"}
"""Arguments of ``moeopt.optimize`` that are no options, and that ask for something else than a GraphModule."""


def run(
    module: PyObject, example_inputs: PyObject, passes: Sequence[Pass], **fields: PyObject
) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
    """See ``moeopt.passes.run``."""
    if isinstance(module, (str, os.PathLike)) or is_onnx(module):
        raise UsageError(
            "passes.run takes a module and gives a GraphModule: give what moeopt.from_onnx or a from_pretrained makes "
            "of the files, or call moeopt.optimize, which takes files"
        )
    if fields.keys() & _OF_OPTIMIZE:
        raise UsageError(
            f"passes.run gives one GraphModule for PyTorch, so it takes no {sorted(fields.keys() & _OF_OPTIMIZE)[0]}=: "
            "leave it out, or call moeopt.optimize"
        )
    done = optimize(module, example_inputs, passes=passes, **fields)
    model = done.model
    if isinstance(model, fx.GraphModule) and rewritten_forward(model) is None:
        return model, done.report.passes
    return as_graph_module(model, done._call), done.report.passes


def as_graph_module(model: nn.Module, call: ArgsKwargs) -> fx.GraphModule:
    """``model`` as one graph, for every size that the model takes; as one call of ``model`` where export refuses it.

    Args:
        call: (args, kwargs) of a real call.
    """
    try:
        with torch.no_grad():
            wider = avoid_size_one(model, *call)
        export = functools.partial(export_program, model, frozen=False)  # the module's weights may change
        program = export_widened(call, wider, export)
        exported: fx.GraphModule = program.module()
        return exported
    except NotSaveableError as err:
        warnings.warn(f"the GraphModule holds {type(model).__name__} as one call: {err}", stacklevel=4)
        return one_call(model, call)


def one_call(model: nn.Module, call: ArgsKwargs) -> fx.GraphModule:
    """A GraphModule with one node, which calls ``model`` with arguments like those of ``call``."""
    graph = fx.Graph()
    args = tuple(graph.placeholder(f"arg_{i}") for i in range(len(call[0])))
    kwargs: dict[str, Any] = {name: graph.placeholder(name) for name in call[1]}
    graph.output(graph.call_module("model", args, kwargs))
    return fx.GraphModule({"model": model}, graph)

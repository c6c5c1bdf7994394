"""A traced model as an ONNX graph in which each grouped-expert op is still one ``moeopt::Experts`` node.

The experts' weights never enter the trace: the node names its :class:`~.site.Site`, which reads them from
the model when a lowering is written. So exporting costs no copy of them, and no node per expert.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.backends.onnxrt.site import DOMAIN, OP, Site
from moeopt.errors import NotSaveableError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.bank import Bank
from moeopt.ops.intercept import intercepted
from moeopt.ops.reference import dtypes, out_features
from moeopt.rewrite.program import rewritten_forward

OPSET = 20


@contextlib.contextmanager
def emitting(model: nn.Module) -> Iterator[list[Site]]:
    """While open, ``experts`` calls of ``model``'s rewritten blocks trace as nodes; the list collects their sites."""
    known = {
        id(bank): (path, router)
        for path, module in model.named_modules()
        if (forward := rewritten_forward(module)) is not None
        for (bank, _), router in zip(forward.banks, forward.program.routers, strict=True)
    }
    sites: list[Site] = []

    def emit(x: Tensor, ids: Tensor, weights: Tensor, bank: Bank, spec: ExpertsSpec) -> Tensor | None:
        if id(bank) not in known:
            return None
        path, router = known[id(bank)]
        taken = sum(site.name.split("#")[0] == path for site in sites)
        name = f"{path or 'experts'}#{taken + 1}" if taken else path or "experts"
        sites.append(Site(name, bank, spec, x.dtype, int(ids.shape[1]), weights.dtype, router))
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}",
            (x, ids.to(torch.int64), weights),
            {"site": len(sites) - 1},
            dtype=dtypes(x, spec)[2],
            shape=(x.shape[0], out_features(bank, spec)),
            version=1,
        )
        return y

    with intercepted(emit):
        yield sites


def to_onnx(program: torch.export.ExportedProgram) -> Any:
    """The graph of an exported program as an ``onnx_ir.Model``, with ``input_0...`` and ``output_0...`` at its ends.

    Raises:
        NotSaveableError: an op that ONNX has no form for; the message names it.
    """
    with quiet():
        try:
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=True, verbose=False)
        except Exception as err:
            raise NotSaveableError(f"the graph has no ONNX form: {_first_line(err)}") from err
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    assert exported is not None  # torch gives None only where it wrote a file itself
    RemoveUnusedNodesPass()(exported.model)
    return exported.model


def own_outputs(graph: Any) -> None:
    """Give each output a value of its own: one that is an input, a weight or another output goes through Identity."""
    import onnx_ir as ir

    seen: set[int] = set()
    for number, value in enumerate(graph.outputs):
        if value.is_graph_input() or value.is_initializer() or id(value) in seen:
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            graph.append(node)
            graph.outputs[number] = copy
        seen.add(id(graph.outputs[number]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print progress, log what is not installed and warn about their own code; none of it is the user's."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(err: BaseException) -> str:
    root: BaseException = err
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0].strip()}" if lines else type(root).__name__

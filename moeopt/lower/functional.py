"""A model as one functional graph: exported with each kind of layer traced once, and its other layers stamped.

What was stamped is never believed: the model runs on the example call and each stamped layer must call the ops of the
traced one, and then the graph is run on that call and held against the model. Where either differs, the graph is made
again with those layers traced each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from moeopt.bundle.golden import check_golden, golden_run
from moeopt.capture.tree import ArgsKwargs
from moeopt.lower.export import export_program
from moeopt.lower.layer_calls import NotStampable
from moeopt.lower.plain_call import plain_call
from moeopt.lower.stamp_graph import OnCopy, write_out
from moeopt.lower.stamps import Stamps
from moeopt.patches import one_trace, quicker_decomposition, quiet
from moeopt.verification.model import run_plain

ONE_SEED = 0
"""Both sides of the comparison draw the same random numbers."""


def without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with no op that writes to its arguments."""
    # quiet: torch warns about its own use of tree specs
    with one_trace, quiet(), quicker_decomposition():
        decomposed: torch.export.ExportedProgram = program.run_decompositions({})
        return decomposed


@dataclass
class Traces:
    """How models are traced while :func:`traces_with` is open.

    Attributes:
        each_layer: no layer stands for its like.
        unproved: some did, in a graph that its maker has yet to compare with the model.
    """

    each_layer: bool = False
    unproved: bool = False


_traces: ContextVar[Traces | None] = ContextVar("moeopt_traces", default=None)


@contextlib.contextmanager
def traces_with(each_layer: bool) -> Iterator[Traces]:
    """While open, models are traced so; what is given tells how that went."""
    traces = Traces(each_layer)
    token = _traces.set(traces)
    try:
        yield traces
    finally:
        _traces.reset(token)


def traces_now() -> Traces:
    """How models are traced here; a note of it where no :func:`traces_with` is open tells nobody."""
    return _traces.get() or Traces()


def export_functional(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    functional: Callable[[torch.export.ExportedProgram], torch.export.ExportedProgram] = without_writes,
    on_copy: OnCopy = lambda node, copy, first, path: None,
    fresh: Callable[[], None] = lambda: None,
    runs: bool = True,
) -> torch.export.ExportedProgram:
    """``export_program`` made functional; of alike layers one is traced.

    Args:
        functional: what makes the exported program functional, and may refuse it.
        on_copy: see :func:`~.stamp_graph.write_out`.
        fresh: called before each trace; there are several where a layer turns out not to be stampable, or its Python
            asks for values.
        runs: whether the graph's ops run in PyTorch, so that the graph is compared with the model. The caller compares
            what is made of a graph that does not run.

    Raises:
        NotSaveableError: the model cannot be exported, or ``functional`` refused it.
    """
    traces = traces_now()
    left_alone = frozenset(type(m) for m in model.modules()) if traces.each_layer else frozenset()
    while True:
        stamps = Stamps(model, left_alone, fresh)
        try:
            program = functional(export_program(model, args, kwargs, stamps=stamps))
            write_out(program, stamps, on_copy)
        except NotStampable as err:
            left_alone |= {err.kind}
            continue
        if odd := stamps.unlike(lambda: run_plain(model, args, kwargs)):
            left_alone |= odd
            continue
        if not runs or not stamps.layers or _same(program, model, (args, kwargs)):
            traces.unproved |= bool(stamps.layers) and not runs
            return program
        left_alone |= {kind.cls for kind in stamps.kinds.values()}


def _same(program: torch.export.ExportedProgram, model: nn.Module, call: ArgsKwargs) -> bool:
    """Whether a program computes what its model does on ``call``."""
    mine, theirs = plain_call(*call), plain_call(*call)  # a forward may write into its arguments
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(ONE_SEED)
        wanted = golden_run(mine[0], mine[1], model(*theirs[0], **theirs[1]))
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        torch.manual_seed(ONE_SEED)
        leaves = pytree.tree_leaves(mine)
        return check_golden(lambda _: _run(program, leaves), [wanted], None).passed is True


def _run(program: torch.export.ExportedProgram, leaves: Sequence[Any]) -> list[Any]:
    """The leaves of a program's result for the leaves of its arguments."""
    signature, given = program.graph_signature, iter(leaves)
    held = {**program.state_dict, **program.constants}
    inputs = [next(given) if s.kind == InputKind.USER_INPUT else held[s.target] for s in signature.input_specs]
    values = torch.fx.Interpreter(program.graph_module, garbage_collect_values=True).run(*inputs)
    pairs = zip(values, signature.output_specs, strict=True)
    return [value for value, spec in pairs if spec.kind == OutputKind.USER_OUTPUT]

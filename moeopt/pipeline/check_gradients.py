"""Where a gradient is asked for: may a rewritten block run, must it stop the gradient, or does the original run?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from moeopt.capture.probe_inputs import call_specs
from moeopt.capture.tree import ArgsKwargs
from moeopt.pipeline.block import Rewrite
from moeopt.rewrite.call_guard import bind
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.live_codes import DequantizedForward, LiveCodes
from moeopt.value_types import PyObject
from moeopt.verification.cases import adversarial_cases
from moeopt.verification.gradients import STOPPED, gradients_differ, skips_idle
from moeopt.verification.state import in_mode

aten = torch.ops.aten


def check_gradients(twin: nn.Module, rewrites: Mapping[str, Rewrite], calls: Mapping[str, ArgsKwargs]) -> None:
    """A block whose gradients differ keeps its rewrite, and runs its original code where one is asked for.

    Args:
        twin: the model with its rewrites installed. Flags of the guards in ``rewrites`` are set.
        rewrites, calls: by module path, what was installed and one real call.
    """
    for path, rewrite in rewrites.items():
        if rewrite.program.block.mutations:
            continue  # such a block is never differentiated in rewritten form
        module = twin.get_submodule(path)
        if any(p.is_inference() for p in module.parameters()):
            continue  # torch never differentiates weights that were made in inference mode
        forward = rewritten_forward(module)
        assert forward is not None
        original = forward.original or type(module).forward.__get__(module)
        args, kwargs = calls[path]
        guard = rewrite.program.guard
        banks = [bank for bank, _ in forward.banks]
        codes = [bank for bank in banks if isinstance(bank, LiveCodes)]
        if codes:  # the quantised model's own code is the judge; what codes stand for has no gradient in either
            original = DequantizedForward(module, original, codes)
        guard.gradients = _differ(module, original, forward, args, kwargs)
        if (reason := guard.gradients) and reason != STOPPED and (before := _let_gradients_through(forward)):
            guard.gradients = ""  # so that the rewritten code runs
            if _differ(module, original, forward, args, kwargs):  # then they were the author's own
                forward.set_graph(before)
                guard.gradients = reason
        if guard.gradients == STOPPED:
            guard.gradients, guard.no_grad = "", True
            continue
        experts = max(len(found.experts) for found in rewrite.found)
        if guard.gradients or experts == 1 or codes or all(bank.stacked() is not None for bank in banks):
            continue

        def rewritten(skip: bool, forward: PyObject = forward, guard: PyObject = guard) -> PyObject:
            guard.skip_idle = skip
            return forward

        def fits(call: ArgsKwargs, forward: PyObject = forward, guard: PyObject = guard) -> bool:
            return not guard.refuses(forward.module, bind(forward.program.signature, *call))

        skips = skips_idle(module, original, rewritten, _idle_calls(args, kwargs, experts, fits))
        guard.skip_idle = skips is True
        if skips is None:
            guard.gradients = (
                "which of its experts have no gradient, and which have one of zeros, is not as in the rewritten code"
            )


def _differ(
    module: nn.Module, original: Callable[..., Any], forward: RewrittenForward, args: PyObject, kwargs: PyObject
) -> str:  # fmt: skip
    """As ``gradients_differ``, in every mode in which the rewritten code runs; ``STOPPED`` if that holds in each."""
    both = forward.program.guard.training is None
    reasons = []
    kept = [module.get_submodule(path) for path in forward.program.block.kept_modules]
    for mode in (module.training, not module.training) if both else (module.training,):
        with in_mode(module, mode):
            reasons.append(gradients_differ(module, original, forward, args, kwargs, kept))
    if all(r == STOPPED for r in reasons):
        return STOPPED
    return next((r if r != STOPPED else "in one of its modes " + r for r in reasons if r), "")


def _let_gradients_through(forward: RewrittenForward) -> fx.Graph | None:
    """Make every detach of its graph an alias; the graph as it was, None where it has no detach.

    A trace without gradients holds detaches that nobody wrote: in-place ops and factories leave them.
    """
    before, through = forward.program.block.graph, fx.Graph()
    if not any(node.target is aten.detach.default for node in before.nodes):
        return None
    through.output(through.graph_copy(before, {}))
    for node in through.nodes:
        if node.target is aten.detach.default:
            node.target = aten.alias.default
    forward.set_graph(through)
    return before


def _idle_calls(args: PyObject, kwargs: PyObject, experts: int, fits: Callable[[ArgsKwargs], bool]) -> list[ArgsKwargs]:
    """Calls that leave most experts idle, and that the rewritten code takes: one token, and copies of one token."""
    for call_spec in call_specs(args, kwargs):
        if all(call_spec.rows(n).shape[-1] == experts for n in call_spec.indices("choices")):
            cases = adversarial_cases(call_spec, experts, level="fast")[1:]
            if calls := [call for case in cases if fits(call := (case.args, case.kwargs))]:
                return calls
    return []

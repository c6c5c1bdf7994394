"""Run an optimised model on data, and count what reaches each of its rewritten MoE blocks.

A rewritten block keeps its own router and calls ``experts`` with what that chose. ``override_experts_impl`` hands each
such call to us first; we count it and leave it as it is. Who called is known from the expert weights, which are the
block's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import CaptureError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.override import override_experts_impl
from moeopt.profiling.tally import Tally
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.value_types import PyObject

SAY_EVERY = 2.0
"""Seconds between two lines of progress."""


def observe(
    model: nn.Module, calls: Iterable[ArgsKwargs], wanted: set[str], measure: bool, say: PyObject
) -> tuple[list[Tally], int]:
    """A tally for each op of the rewritten modules whose name is in ``wanted``, and how many calls were made.

    The model runs under ``no_grad`` on copies of the inputs. ``measure``: also time a few calls of each block.

    Raises:
        CaptureError: the model raised on one of the calls; the message numbers it.
    """
    tallies: dict[int, Tally] = {}
    owners: list[tuple[RewrittenForward, list[Tally], int]] = []
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        forward, name = rewritten_forward(module), path or type(model).__name__
        if forward is None or name not in wanted or id(module) in seen:
            continue
        seen.add(id(module))
        own = []
        for i, (bank, _) in enumerate(forward.banks):
            own.append(Tally(name, bank.num_experts, i if len(forward.banks) > 1 else None))
            tallies[id(bank)] = own[-1]
        owners.append((forward, own, forward.fallbacks))

    def count(x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> None:
        tally = tallies.get(id(bank))
        if tally is not None:
            tally.add(ids, weights)
            if measure and tally.cost.wants(ids):
                tally.cost.measure(x, ids, weights, bank, spec)

    number, said = 0, float("-inf")
    with torch.no_grad(), override_experts_impl(count):
        for number, call in enumerate(calls, 1):
            if time.perf_counter() - said > SAY_EVERY:
                said = time.perf_counter()
                say(f"batch {number}")
            args, kwargs = clone_inputs(call)
            try:
                model(*args, **kwargs)
            except Exception as err:
                raise CaptureError(
                    f"{type(model).__name__} raised {type(err).__name__} on batch {number - 1} of the data: {err}; "
                    "check that it runs on it in eager mode"
                ) from err
    for forward, own, before in owners:
        for tally in own:
            tally.unseen = forward.fallbacks - before
            tally.why_unseen = forward.last_refusal if tally.unseen else ""
    return list(tallies.values()), number

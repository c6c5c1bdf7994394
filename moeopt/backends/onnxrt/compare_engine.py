"""End to end: an engine against the model that it was built from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.ties import Ties
from moeopt.capture.tree import ArgsKwargs
from moeopt.causal_lm.chunked_cases import causal_calls
from moeopt.errors import NotEquivalentError
from moeopt.lower.other_sizes import sizes_to_try
from moeopt.lower.unexpected_errors import format_error
from moeopt.options import Options
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.verification.language import find_ids
from moeopt.verification.model import EndToEnd, OriginalRuns, end_to_end, run_plain
from moeopt.verification.pins import RoutingLog
from moeopt.verification.ties import exactly_tied
from moeopt.verification.trees import same_calls
from moeopt.verification.unusual import unusual_calls

CountIds = Callable[[ArgsKwargs], tuple[int, int, str]]
"""Expert ids inside the engine on a call: how many were compared with the model's, how many differ, and where."""

KnownRuns = list[tuple[ArgsKwargs, OriginalRuns]]
"""Calls and the model's runs on them: a second engine of the same model is held against the same runs."""


@dataclass
class _Comparison:
    """Calls on which the engine is held against the model, what came of each, and why others were left out."""

    source: nn.Module
    engine: GraphEngine
    outcome: PipelineResult
    options: Options
    narrow: bool
    runs: list[tuple[str, ArgsKwargs, Callable[..., Any]]]
    unusual: set[str]
    left_out: list[str]
    verdicts: list[tuple[str, ArgsKwargs, EndToEnd]] = field(default_factory=list)
    also_tied: list[str] = field(default_factory=list)


def compare_engine(
    source: nn.Module, engine: GraphEngine, call: ArgsKwargs, outcome: PipelineResult, options: Options,
    count: CountIds, ties_of: Callable[[list[str]], Ties | None], known: KnownRuns,
) -> EndToEnd | None:  # fmt: skip
    """The verdict on the given call, expert ids counted; in strict mode the call in other sizes must agree too.

    Those other sizes are judged in float32 and wider only: a 16-bit router ties often, and each runtime breaks ties
    its own way. The blocks were verified in other sizes whatever the dtype is.

    Args:
        source: the original model.
        engine: what computes here.
        call: what the model was optimised on.
        outcome: of the pipeline.
        count: what compares the expert ids inside the engine.
        ties_of: what tells ties from flips, given the modules whose rounding explains a difference.
        known: runs of ``source`` that were made for another engine of it; those that are made here are added.

    Raises:
        NotEquivalentError: they differ; the message has the sizes and the first other choice of experts.
    """
    if options.verify == "off":
        return None
    options.say("comparing the engine end to end")
    compared = _calls_to_compare(source, engine, call, outcome, options)
    _run_all(compared, ties_of, known)
    for what, one, verdict in compared.verdicts:
        if not verdict.passed:
            raise _not_equivalent(compared, what, one, verdict, count)
    first = compared.verdicts[0][2]
    first_of = ""
    try:
        first.ids, first.ids_differ, first_of = count(compared.verdicts[0][1])
    except Exception as err:  # ONNX Runtime's own: the count must not fail an engine that is right
        first.notes.append(f"expert ids were not compared: {type(err).__name__}: {err}")
    if first_of and not first.ties:
        first.notes.append(f"the result stays within its budget although some experts differ; the first is {first_of}")
    first.notes += _notes(compared)
    return first


def _calls_to_compare(
    source: nn.Module, engine: GraphEngine, call: ArgsKwargs, outcome: PipelineResult, options: Options
) -> _Comparison:
    """The given call; in strict mode other sizes, steps with a cache and unusual values too."""
    args, kwargs = call
    if engine.causal_lm is not None:
        kwargs = {**kwargs, "use_cache": False}  # the cache is compared by what comes of it
    narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in source.parameters())
    runs: list[tuple[str, ArgsKwargs, Callable[..., Any]]] = [("", (args, kwargs), engine)]
    left_out: list[str] = []
    if options.verify == "strict" and not narrow:
        ids = find_ids(args, kwargs)
        if engine.causal_lm is None:
            others, left_out = sizes_to_try(engine.signature, call)
            runs += [("another size", one, engine) for one in others if engine.holds(one)]
            left_out += [
                f"{shapes(one)}: no profile of the engine holds them" for one in others if not engine.holds(one)
            ]
        elif ids is not None:
            runs += [(what, ((), one), form) for what, one, form in causal_calls(engine.causal_lm, kwargs, ids)]
    unusual = unusual_calls((args, kwargs)) if options.verify == "strict" else []
    runs += [(what, one, engine) for what, one in unusual if engine.holds(one)]
    return _Comparison(source, engine, outcome, options, narrow, runs, {what for what, _ in unusual}, left_out)


def _run_all(compared: _Comparison, ties_of: Callable[[list[str]], Ties | None], known: KnownRuns) -> None:
    """Run the model and the engine on each call; a call that the model itself does not take is left out."""
    source, engine = compared.source, compared.engine
    noise = [*weighted(source), *compared.outcome.rewrites]  # the runtime computes every op anew, so each may round
    ties = ties_of(noise)
    own = not any(r.found for r in compared.outcome.rewrites.values())
    own |= any(b.kind == "moe" and b.status == "declined" for b in compared.outcome.blocks)
    for what, one, form in compared.runs:
        runs = next((runs for call, runs in known if same_calls(call, one)), None)
        try:
            if runs is None:
                run_plain(source, *one)
        except Exception as err:
            if not what:
                raise
            compared.left_out.append(f"{shapes(one)}: the model itself does not take them ({format_error(err)})")
            continue
        if runs is None:
            runs = OriginalRuns.of(source, *one, noise, compared.options.seed)
            known.append((one, runs))
        whole = ties is not None and form in (engine, engine.causal_lm)
        verdict = end_to_end(
            source, form, *one, noise_blocks=noise, seed=compared.options.seed, greedy_steps=0 if what else 8,
            otherwise=functools.partial(ties.compare, one) if whole and ties is not None else None, known=runs,
        )  # fmt: skip
        if not verdict.passed and what in compared.unusual and own and _ties_exactly(source, one):
            compared.also_tied.append(what)
        else:
            compared.verdicts.append((what, one, verdict))


def _ties_exactly(source: nn.Module, call: ArgsKwargs) -> bool:
    """Whether the model chooses between equal scores on this call."""
    log = RoutingLog()
    with log:
        run_plain(source, *call)
    return exactly_tied(log.events)


def _not_equivalent(
    compared: _Comparison, what: str, call: ArgsKwargs, verdict: EndToEnd, count: CountIds
) -> NotEquivalentError:
    """The error that says on which call the engine differs, where, and what to do."""
    first_of = ""
    with contextlib.suppress(Exception):
        first_of = count(call)[2]
    way_out = "use backend='torch', or report this with the model's code"
    if compared.source.training:
        way_out = "the model is in training mode, and may be random there: call model.eval() and optimise again"
    return NotEquivalentError(
        f"the {compared.engine.runtime} engine of {type(compared.source).__name__} is not equivalent and was not kept: "
        f"{verdict.reason} (inputs of sizes {shapes(call)}"
        f"{', ' + what if what.startswith('through') or what in compared.unusual else ''}"
        f"{f'; the first other choice of experts: {first_of}' if first_of else ''}); {way_out}"
    )


def _notes(compared: _Comparison) -> list[str]:
    """What else was equal, what was left out and why, and what nothing can be said of."""
    notes = []
    equal = sum(what == "another size" for what, *_ in compared.verdicts)
    if equal:
        notes.append(f"equal in {equal} other sizes too")
    whats = [what for what, *_ in compared.verdicts[1:] if what != "another size"]
    for unusual in (False, True):
        if also := [what for what in whats if (what in compared.unusual) is unusual]:
            notes.append(f"equal with {', '.join(also)} too")
    notes += [f"not compared in the sizes {line}" for line in compared.left_out]
    if compared.narrow and compared.options.verify == "strict":
        notes.append("compared end to end in no other size: 16-bit routers tie often; blocks were, each by itself")
    for what in compared.also_tied:
        notes.append(f"with {what} nothing can be told: code that was left as it is chooses between equal scores")
    return notes + [note for _, _, verdict in compared.verdicts[1:] for note in verdict.notes if "not judged" in note]


def shapes(call: ArgsKwargs) -> str:
    leaves = torch.utils._pytree.tree_leaves(call)
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor))


def weighted(model: nn.Module) -> list[str]:
    """The modules that hold weights themselves."""
    return [n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]

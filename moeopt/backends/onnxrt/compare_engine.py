"""End to end: an engine against the model that it was built from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
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
from moeopt.pipeline.run import PipelineResult
from moeopt.verification.language import find_ids
from moeopt.verification.model import EndToEnd, end_to_end, run_plain
from moeopt.verification.pins import RoutingLog
from moeopt.verification.ties import exactly_tied
from moeopt.verification.unusual import unusual_calls

CountIds = Callable[[ArgsKwargs], tuple[int, int, str]]
"""Expert ids inside the engine on a call: how many were compared with the model's, how many differ, and where."""


def compare_engine(
    source: nn.Module, engine: GraphEngine, call: ArgsKwargs, outcome: PipelineResult, options: Options,
    count: CountIds, ties_of: Callable[[list[str]], Ties | None],
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

    Raises:
        NotEquivalentError: they differ; the message has the sizes and the first other choice of experts.
    """
    if options.verify == "off":
        return None
    options.say("comparing the engine end to end")
    args, kwargs = call
    if engine.causal_lm is not None:
        kwargs = {**kwargs, "use_cache": False}  # the cache is compared by what comes of it
    noise = [*weighted(source), *outcome.rewrites]  # the runtime computes every op anew, so each may round
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
    ties = ties_of(noise)
    declined = any(b.kind == "moe" and b.status == "declined" for b in outcome.blocks)
    also_tied: list[str] = []
    verdicts = []
    for what, one, form in runs:
        try:
            run_plain(source, *one)
        except Exception as err:
            if not what:
                raise
            left_out.append(f"{shapes(one)}: the model itself does not take them ({format_error(err)})")
            continue
        steps = 0 if what else 8
        whole = ties is not None and form in (engine, engine.causal_lm)
        otherwise = functools.partial(ties.compare, one) if whole and ties is not None else None
        verdict = end_to_end(
            source, form, *one, noise_blocks=noise, seed=options.seed, greedy_steps=steps, otherwise=otherwise
        )
        if not verdict.passed and what in dict(unusual) and declined:
            log = RoutingLog()
            with log:
                run_plain(source, *one)
            if exactly_tied(log.events):
                also_tied.append(what)
                continue
        verdicts.append((what, one, verdict))
    first_of = ""
    for what, one, verdict in verdicts:
        if not verdict.passed:
            with contextlib.suppress(Exception):
                first_of = count(one)[2]
            way_out = "use backend='torch', or report this with the model's code"
            if source.training:
                way_out = "the model is in training mode, and may be random there: call model.eval() and optimise again"
            raise NotEquivalentError(
                f"the {engine.runtime} engine of {type(source).__name__} is not equivalent and was not kept: "
                f"{verdict.reason} (inputs of sizes {shapes(one)}"
                f"{', ' + what if what.startswith('through') or what in dict(unusual) else ''}"
                f"{f'; the first other choice of experts: {first_of}' if first_of else ''}); {way_out}"
            )
    first = verdicts[0][2]
    try:
        first.ids, first.ids_differ, first_of = count(verdicts[0][1])
    except Exception as err:  # ONNX Runtime's own: the count must not fail an engine that is right
        first_of = ""
        first.notes.append(f"expert ids were not compared: {type(err).__name__}: {err}")
    if first_of and not first.ties:
        first.notes.append(f"the result stays within its budget although some experts differ; the first is {first_of}")
    equal = sum(what == "another size" for what, *_ in verdicts)
    if equal:
        first.notes.append(f"equal in {equal} other sizes too")
    whats = [what for what, *_ in verdicts[1:] if what != "another size"]
    for also in ([w for w in whats if w not in dict(unusual)], [w for w in whats if w in dict(unusual)]):
        if also:
            first.notes.append(f"equal with {', '.join(also)} too")
    first.notes += [f"not compared in the sizes {line}" for line in left_out]
    if narrow and options.verify == "strict":
        first.notes.append(
            "compared end to end in no other size: 16-bit routers tie often; blocks were, each by itself"
        )
    for what in also_tied:
        first.notes.append(f"with {what} nothing can be told: a block that was declined chooses between equal scores")
    first.notes += [note for _, _, verdict in verdicts[1:] for note in verdict.notes if "not judged" in note]
    return first


def shapes(call: ArgsKwargs) -> str:
    leaves = torch.utils._pytree.tree_leaves(call)
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor))


def weighted(model: nn.Module) -> list[str]:
    """The modules that hold weights themselves."""
    return [n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]

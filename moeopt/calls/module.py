"""``optimize`` of a module."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import time
from collections.abc import Mapping

from torch import nn

from moeopt.backends.choice import checked_choice
from moeopt.capture.dead_proxies import set_aside
from moeopt.capture.unreadable_models import refuse_scripted
from moeopt.errors import UsageError
from moeopt.find.example_inputs import NO_CACHE, as_call, in_order, made_up, without_cache
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.pipeline.accept import as_model, moved, moves, without_rewrites
from moeopt.progress import shown
from moeopt.rewrite.whole_model import watch_source
from moeopt.value_types import PyObject


def check_no_arguments(model: PyObject, fields: Mapping[str, PyObject]) -> None:
    """``UsageError`` where inputs of the model's own were given as if they were options."""
    if not isinstance(model, nn.Module):
        return
    refuse_scripted(model)  # a traced one has no signature
    own = [name for name in fields if name in inspect.signature(model.forward).parameters]
    if own and not any(name in {f.name for f in dataclasses.fields(Options)} for name in own):
        raise UsageError(
            f"{', '.join(own)}: these are inputs of {type(model).__name__}, no options: give them together, "
            f"moeopt.optimize(model, dict({own[0]}=...))"
        )


def optimize_module(
    model: PyObject, example_inputs: PyObject, backend: str, options: Options, plan: PyObject = None
) -> Optimized:
    """The module, optimised; ``plan`` is the backend's, where it is not the one that ``options`` ask for."""
    started = time.perf_counter()
    chosen, runtime, asked_for = checked_choice(backend, options)
    plan = asked_for if plan is None else plan
    if isinstance(model, Optimized):
        raise UsageError("this model is optimised already; pass the original, or its .model after a change")
    given = as_model(model)
    with set_aside(given, for_good=chosen.inplace):
        source = without_rewrites(given, chosen.inplace)
        asked = made_up(source, chosen.seed) if example_inputs is None else as_call(example_inputs)
        call = in_order(source, without_cache(source, asked))
        if moves(source, chosen):
            source = source if chosen.inplace else copy.deepcopy(source)
            source = source.to(device=chosen.device, dtype=chosen.dtype)
        call = moved(call, chosen)
        with shown(chosen.progress) as say:
            made = runtime.optimize(source, call, dataclasses.replace(chosen, progress=say), plan)
    notes = made.report.notes
    if call[1].get("use_cache") is False and hasattr(source, "main_input_name") and not runtime.keeps_cache(made):
        notes = (*notes, NO_CACHE)
    made.report = dataclasses.replace(made.report, notes=notes, seconds=time.perf_counter() - started)
    if isinstance(made.model, nn.Module) and made.model is not given:
        cast = source is not given and (chosen.device, chosen.dtype) != (None, None)
        watch_source(given, made.model, values=cast or bool(made.certificate.lossy))
    return Optimized(made, call)

"""``moeopt.profile``: rewrite the blocks if that is not done, run the data, and sum up."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeopt.api import Optimized, optimize
from moeopt.bundle.engine import Engine
from moeopt.capture.tree import ArgsKwargs
from moeopt.distributed.optimized import DistributedOptimized
from moeopt.errors import UsageError
from moeopt.find.batches import batches
from moeopt.frontends.onnx_files import from_onnx
from moeopt.onnx_in.read import is_onnx
from moeopt.options import Options
from moeopt.profiling.observe import observe
from moeopt.profiling.result import LoadProfile, Unread, layer_load
from moeopt.report import Report
from moeopt.value_types import PyObject


def profile(
    model: PyObject,
    data: PyObject = None,
    *,
    measure: bool = True,
    seed: int = 0,
    hints: PyObject = None,
    progress: Callable[[str], None] | None = None,
) -> LoadProfile:
    """How often each expert of each layer fires on ``data``, how uneven that is, and what it costs.

    A plain model is first rewritten, on copies of its modules that share its weights, without verification; an
    :class:`moeopt.Optimized` of the torch backend is taken as it is. The model then runs on each batch as its owner
    would call it, under ``no_grad``. Only counts are kept.

    Args:
        model: an ``nn.Module`` (or what else ``optimize`` takes), or what ``optimize`` returned. An ONNX model is
            run by an interpreter (:func:`moeopt.from_onnx`).
        data: one call's inputs as ``optimize`` takes them (a tensor, a tuple, a mapping), or an iterable of such (a
            list, a generator, a DataLoader); batches may differ in size. None: made-up inputs, where the model
            says what it takes; their routing is that of random tokens.
        measure: also time the op of each block on a few calls, as routed and balanced.
        seed: of made-up inputs.
        hints: as in :class:`moeopt.Options`, for a plain model.
        progress: is told in a line what is being done.

    Returns:
        :class:`LoadProfile`; MoE blocks whose routing could not be read are in its ``unread``, with the reason.

    Raises:
        UsageError: the model has no MoE block, or is an engine; the data are of no known form, or empty.
        CaptureError: the model does not run on a batch.
    """
    if is_onnx(model):
        model = from_onnx(model)
        data = model.example if data is None else data
    _refuse_engines(model)
    started = time.perf_counter()
    say = progress or (lambda line: None)
    optimized, calls, notes = _rewritten(model, data, seed, hints, progress)
    report = optimized.report
    moe = [b for b in report.blocks if b.kind == "moe"]
    if not moe:
        raise UsageError(_no_moe(report))
    wanted = {b.name for b in moe if b.status == "rewritten"}
    tallies, number = observe(optimized.model, calls, wanted, measure, say) if wanted else ([], 0)
    unread = dict.fromkeys((b.name, b.reason, b.source) for b in moe if b.status == "declined")
    counted = {t.module for t in tallies}
    unread |= dict.fromkeys((b.name, _GONE, b.source) for b in moe if b.name in wanted - counted)
    return LoadProfile(
        model=report.model,
        batches=number,
        layers=tuple(layer_load(t) for t in tallies),
        unread=tuple(Unread(*u) for u in unread),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _rewritten(
    model: PyObject, data: PyObject, seed: int, hints: Mapping[str, Any] | None, progress: Callable[[str], None] | None
) -> tuple[Optimized, Iterator[ArgsKwargs], list[str]]:
    """The model in rewritten form, the calls that it is profiled on, and what a reader must know of the calls."""
    calls: Iterator[ArgsKwargs] = iter(()) if data is None else batches(data)
    if isinstance(model, Optimized):
        if data is not None:
            return model, calls, []
        return model, iter([model._call]), ["the inputs are those that the model was optimised with"]
    first = next(calls, None)
    options = Options(verify="off", seed=seed, progress=progress, hints=hints or {})
    optimized = optimize(model, first, options=options)
    if first is not None:
        return optimized, itertools.chain([first], calls), []
    return optimized, iter([optimized._call]), ["the inputs are made up: the routing is that of random tokens"]


_GONE = "the model no longer has this module in rewritten form; optimize it again"


def _refuse_engines(model: PyObject) -> None:
    inner = model.model if isinstance(model, Optimized) else model
    bundle = isinstance(model, (str, os.PathLike))
    if bundle or isinstance(inner, Engine):
        what = f"{os.fspath(model)!r} is a path" if bundle else "this is an engine"
        raise UsageError(
            f"{what}: routing happens inside an engine's graph and cannot be counted there; profile the original "
            "model, moeopt.profile(model, data), whose router makes the same choices"
        )
    if isinstance(model, DistributedOptimized):
        raise UsageError(
            "this model's experts lie on several ranks, each of which sees its own tokens only: profile what "
            "moeopt.optimize returned, before moeopt.distribute"
        )


def _no_moe(report: Report) -> str:
    n = len(report.blocks)
    found = f"{n} dense feed-forward block{' was' if n == 1 else 's were'} found" if n else "nothing was found"
    return f"{report.model} has no mixture-of-experts block ({found}), so there is no expert load"

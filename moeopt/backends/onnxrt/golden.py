"""The golden runs of an ONNX Runtime engine: the call it was made with, and the same call in other sizes.

Another provider rounds otherwise, and so does another session on the same machine: one whose weights were not packed,
or of the plain graph. What it may differ by is the budget that the engine itself was held to end to end: what one
rounding error in each block moves the result by. A run that moves further when each of its products is rounded
otherwise has an expert choice on the edge; it would say nothing of the machine, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.shaken import shaken
from moeopt.bundle.caches import result_leaves
from moeopt.bundle.golden import SLACK, Golden, golden_run, with_edges
from moeopt.capture.tree import ArgsKwargs
from moeopt.value_types import PyObject
from moeopt.verification.rounded import moved_by_rounding

NUDGES = 2


def budget_of(certificate: PyObject) -> tuple[float | None, str]:
    """The relative L2 distance per token that golden runs may come back with, and why; None is 8 eps."""
    end = getattr(certificate, "end_to_end", None)
    if end is None or end.passed is not True or not end.budget > 0:
        return None, f"{SLACK:g} eps of the result's dtype: the engine was not verified end to end"
    if getattr(certificate, "activations", {}):
        why = "what rounding activations to int8 moves one product by: another CPU's kernels may differ"
        return moved_by_rounding(certificate), why
    return float(end.budget), "the end-to-end budget that the engine was verified with: another provider rounds too"


def golden_runs(engine: GraphEngine, calls: Sequence[ArgsKwargs], distance: float | None) -> list[Golden]:
    """What ``engine`` makes of each call; those that are on the edge as a whole left out unless none is left."""
    runs = []
    for number, (args, kwargs) in enumerate(calls):
        try:
            runs.append(golden_run(args, kwargs, engine.run_graph(*args, **kwargs)))
        except Exception:
            if number == 0:
                raise
            continue  # a size that the model cannot take
    with shaken(engine) as inside:
        steady = [with_edges(run, _again(engine, run, inside), distance, engine.states) for run in runs]
    return [run for run in steady if run is not None] or runs[:1]


def _again(engine: GraphEngine, run: Golden, inside: bool) -> list[list[Any]]:
    """The results of the same call, with the noise of rounding ``inside`` the engine or on its inputs."""
    generator = torch.Generator().manual_seed(0)

    def nudged(value: PyObject) -> PyObject:
        if inside or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        return (value.double() * (1 + torch.finfo(value.dtype).eps * noise)).to(value.dtype)

    return [result_leaves(engine.run_flat([nudged(v) for v in run.inputs])) for _ in range(NUDGES)]

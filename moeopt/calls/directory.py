"""``optimize`` and ``explain`` of a Hugging Face directory, which is streamed."""

from __future__ import annotations

import dataclasses
import os

from moeopt.backends.choice import checked_choice
from moeopt.calls.module import optimize_module
from moeopt.checkpoint.journal import Workspace
from moeopt.checkpoint.stream import check_directory, streamed
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.progress import shown
from moeopt.report import Report
from moeopt.value_types import PyObject


def optimize_directory(
    path: str | os.PathLike[str],
    example_inputs: PyObject,
    backend: str,
    chosen: Options,
    out: str | os.PathLike[str] | None,
    task: str | None,
    trust_remote_code: bool,
    workspace: Workspace | None = None,
) -> Optimized:
    """The directory's model, optimised; other processes share ``workspace``, given instead of ``out``."""
    path = check_directory(path)
    _, _, plan = checked_choice(backend, chosen)
    with (
        shown(chosen.progress) as say,
        streamed(
            path, dataclasses.replace(chosen, progress=say), backend=backend, out=out, task=task,
            trust_remote_code=trust_remote_code, inputs=example_inputs, workspace=workspace,
        ) as source,
    ):  # fmt: skip
        inner = dataclasses.replace(chosen, progress=say, dtype=None, mapped=True)
        made = optimize_module(
            source.model, example_inputs, backend, inner, plan
        )  # of lowerings for the user's own mapped=
        source.check(made)
        if out is not None:
            source.save(made, out)
    return made


def explain_directory(
    path: str | os.PathLike[str], example_inputs: PyObject, chosen: Options, task: str | None, trust_remote_code: bool
) -> Report:
    """The report of a dry run, which reads one layer of each kind."""
    path = check_directory(path)
    with streamed(path, chosen, task=task, trust_remote_code=trust_remote_code, alike=True) as source:
        inner = dataclasses.replace(chosen, dtype=None)
        return source.noted(optimize_module(source.model, example_inputs, "torch", inner).report)

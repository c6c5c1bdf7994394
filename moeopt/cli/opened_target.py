"""A target of a command as a model: a directory's weights stay on disk, anything else is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeopt.cli.target import CommandTarget, load_target
from moeopt.errors import MoeoptError, UsageError
from moeopt.html import check_target
from moeopt.value_types import PyObject


@dataclass
class OpenedTarget:
    """``streamed`` is a :class:`moeopt.checkpoint.stream.StreamedModel`, or None where the model was loaded.

    ``fields`` are the options that are left for ``moeopt.optimize``, ``notes`` sentences for the report.
    """

    model: PyObject
    inputs: PyObject
    fields: dict[str, Any]
    streamed: PyObject = None
    notes: tuple[str, ...] = ()

    def check(self, optimized: PyObject) -> None:
        """Compare what was streamed layer by layer too, and put what is to say of the target into the report."""
        if self.streamed is not None:
            self.streamed.check(optimized)
        elif self.notes:
            optimized.report = self.noted(optimized.report)
            optimized.certificate.notes += [*self.notes]

    def noted(self, report: PyObject) -> PyObject:
        """``report`` with what is to say of the target."""
        if self.streamed is not None:
            return self.streamed.noted(report)
        return dataclasses.replace(report, notes=(*report.notes, *self.notes)) if self.notes else report

    def bar(self, quiet: bool) -> contextlib.AbstractContextManager[None]:
        """While open, a command that was told to be quiet draws no bar of progress."""
        from moeopt.progress import never_by_itself  # needs torch, which the target has brought by now

        return never_by_itself() if quiet else contextlib.nullcontext()

    def write_page(self, optimized: PyObject, html: Path | None, measure: bool) -> None:
        """The report as a page, where one is asked for; with ``measure``, figures of calls before and after."""
        if html is not None:
            from moeopt.cli.measured import figures

            optimized.report.to_html(html, **(figures(self.model, optimized) if measure else {}))

    def save(self, optimized: PyObject, out: Path, overwrite: bool) -> Exception | None:
        """What stopped the bundle from being written to ``out``; None where it is there."""
        more = {"overwrite": True} if overwrite else {}
        try:
            if self.streamed is None:
                optimized.save(out, **more)
            else:
                self.streamed.save(optimized, out, **more)
        except (MoeoptError, OSError) as err:
            return err
        return None


def check_page(html: Path | None, measure: bool, moved: bool) -> None:
    """``UsageError`` where the page cannot be written, or ``--measure`` has no page or would compare unlike things."""
    if html is not None:
        check_target(html)
    if measure and (html is None or moved):
        raise UsageError("--measure adds to the page of --html, and compares like with like: without --device, --dtype")


@contextlib.contextmanager
def opened_target(
    found: CommandTarget,
    fields: Mapping[str, Any],
    *,
    loaded: bool = False,
    backend: str = "torch",
    out: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    task: str | None = None,
    progress: PyObject = None,
    alike: bool = False,
) -> Iterator[OpenedTarget]:
    """The model of a command's target, and its inputs.

    Args:
        fields: options of the command.
        loaded: load it whole, also where it could be streamed.
        alike: of the layers that are alike, read one.
    """
    if loaded or not streams(found):
        made = load_target(found, trust_remote_code=trust_remote_code, seed=seed, task=task)
        told = found.random_weights(seed)
        yield OpenedTarget(*made, fields=dict(fields), notes=(told,) if told else ())
        return
    from moeopt.checkpoint.stream import streamed
    from moeopt.options import Options
    from moeopt.progress import shown

    assert found.directory is not None
    rest = {**{name: value for name, value in fields.items() if name != "dtype"}, "mapped": True}
    with (
        shown(progress) as say,
        streamed(
            found.directory, Options.from_fields(None, {**fields, "progress": say}), backend=backend, out=out,
            task=task, trust_remote_code=trust_remote_code, overwrite=overwrite, alike=alike,
        ) as source,
    ):  # fmt: skip
        yield OpenedTarget(source.model, _inputs(found.directory, source.model, seed), rest, source)


def streams(found: CommandTarget) -> bool:
    """Whether the target is a directory of safetensors files that hold plain numbers, or codes that moeopt reads."""
    if found.directory is None or not any(file.suffix == ".safetensors" for file in found.weights):
        return False
    with contextlib.suppress(ValueError, OSError, AttributeError, RecursionError):
        config = json.loads((found.directory / "config.json").read_text(encoding="utf-8"))
        return not config.get("quantization_config") or _codes_are_read(found.directory)
    return True


@functools.lru_cache(maxsize=1)
def _codes_are_read(directory: Path) -> bool:
    from moeopt.published.directory_of import stated_by  # needs torch, as only a quantised directory does so early
    from moeopt.published.quantised_tensors import quantised_tensors
    from moeopt.published.tensor_files import SafetensorsDirectory

    try:
        stored = quantised_tensors(SafetensorsDirectory(directory), stated_by(directory))
    except MoeoptError:  # said when it is opened
        return True
    return bool(stored.matrices) and not stored.unread


def _inputs(directory: Path, model: PyObject, seed: int) -> dict[str, Any]:
    from moeopt.find.example_inputs import made_up

    try:
        return made_up(model, seed)[1]
    except UsageError as err:
        raise UsageError(
            f"{directory}: no inputs could be made up for it ({err}): write a factory that returns the model and its "
            "example inputs, and give file.py:factory"
        ) from None

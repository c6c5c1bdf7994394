"""``moeopt optimize``: rewrite, verify, save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moeopt.cli.limits import as_limits, missed_words
from moeopt.cli.opened_target import check_page, opened_target
from moeopt.cli.preflight import check_choice, check_out, chosen_backend
from moeopt.cli.printing import api, exit_unless, names_in, print_json, progress, say_unless, show
from moeopt.cli.quantize_words import as_quantize
from moeopt.cli.target import find_target, load_data
from moeopt.cli.words import (
    Activations,
    AsJson,
    BackendName,
    BuiltFor,
    Calibration,
    CastTo,
    Html,
    LimitTo,
    Overwrite,
    QuantizeMethod,
    QuantizeProducts,
    QuantizeTo,
    Quiet,
    RunsOn,
    Seed,
    TargetArgument,
    Task,
    Trust,
    Tune,
    VerifyLevel,
)
from moeopt.untrusted import shown
from moeopt.value_types import PyObject


def optimize_command(
    target: TargetArgument,
    backend: BackendName = None,
    out: Annotated[Path | None, typer.Option(help="write a bundle to this directory")] = None,
    verify: VerifyLevel = None,
    device: RunsOn = None,
    built_for: BuiltFor = None,
    dtype: CastTo = None,
    tune: Tune = False,
    portable: Annotated[bool, typer.Option("--portable", help="an engine of ONNX's own operators only")] = False,
    html: Html = None,
    measure: Annotated[bool, typer.Option("--measure", help="with --html: time a call before and after")] = False,
    skip_passes: Annotated[str | None, typer.Option(help="passes that do not run, with commas between")] = None,
    only_passes: Annotated[str | None, typer.Option(help="the only passes that run, with commas between")] = None,
    print_passes: Annotated[bool, typer.Option("--print-passes", help="list what each pass did")] = False,
    quantize: QuantizeTo = None,
    quantize_products: QuantizeProducts = None,
    activations: Activations = None,
    quantize_method: QuantizeMethod = None,
    calibration: Calibration = None,
    limit: LimitTo = None,
    overwrite: Overwrite = False,
    task: Task = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite a model's MoE blocks, verify them, and save the result with --out."""
    check_page(html, measure, device is not None or dtype is not None)
    found = find_target(target, task)
    backend = chosen_backend(backend, found)
    given: dict[str, Any] = {
        "verify": verify, "device": device, "target": built_for, "dtype": dtype, "tune": tune, "seed": seed,
        "skip_passes": skip_passes and names_in(skip_passes), "only_passes": only_passes and names_in(only_passes),
        "print_passes": print_passes or None, "portable": portable or None,
        "quantize": as_quantize(quantize, quantize_products or (), activations, quantize_method),
        "limit": as_limits(limit or ()) or None,
        "calibration": load_data(calibration, "--calibration") if calibration is not None else None,
    }  # fmt: skip
    fields = {name: value for name, value in given.items() if value is not None}
    check_choice(backend, fields)
    say_unless(quiet, found.random_weights(seed))
    replaced = "" if out is None else check_out(out, found, verify, overwrite)
    with opened_target(
        found, fields, loaded=measure, backend=backend, out=out, overwrite=overwrite, seed=seed, task=task,
        trust_remote_code=trust_remote_code, progress=progress(quiet),
    ) as opened:  # fmt: skip
        with opened.bar(quiet):
            optimized = api().optimize(
                opened.model, opened.inputs, backend=backend, progress=progress(quiet), **opened.fields
            )
            opened.check(optimized)
        opened.write_page(optimized, html, measure)  # a model that has no bundle form still has a report
        stopped = None if out is None else opened.save(optimized, out, overwrite)
    _print_optimized(optimized, out if stopped is None else None, replaced, html, stopped, as_json)
    if stopped is not None:
        raise stopped
    exit_unless(optimized.certificate.passed, missed_words(optimized.certificate) or "not equivalent")


def _print_optimized(
    optimized: PyObject, saved: Path | None, replaced: str, html: Path | None, stopped: Exception | None, as_json: bool
) -> None:
    """Report and certificate, where they were saved and in whose place, and what stopped the bundle."""
    if as_json:
        certificate = json.loads(optimized.certificate.to_json())
        body = {"report": optimized.report.to_dict(), "certificate": certificate, "saved": saved and str(saved)}
        print_json(body if stopped is None else {**body, "not_saved": str(stopped)})
        return
    show(optimized.report)
    print()
    show(optimized.certificate)
    if saved:
        place = f", in the place of the bundle that was there ({replaced})" if replaced else ""
        print(f"\nsaved: {shown(saved)}{place}")
    if html is not None:
        print(f"\nhtml: {shown(html)}")

"""The commands themselves: read the words, call ``moeopt.api``, print, and set the exit code.

What needs torch is imported by the command that needs it, after the words were checked: help, the version and a
mistyped path shall not wait for seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import moeopt
from moeopt.checkpoint.tasks import TASKS
from moeopt.cli.early import check_backend, check_bundle, check_certificate
from moeopt.cli.inspect_command import inspect_command
from moeopt.cli.limits import LimitTo, QuantizeTo, as_limits, missed_words
from moeopt.cli.opened_target import opened_target
from moeopt.cli.passes_command import passes_command
from moeopt.cli.plan_command import plan_command
from moeopt.cli.preflight import check_choice, check_out
from moeopt.cli.profile_command import profile_command
from moeopt.cli.schema_command import schema_command
from moeopt.cli.target import FORMS, BuiltFor, find_target, load_target
from moeopt.cli.triton_command import triton_command
from moeopt.errors import UsageError
from moeopt.html import check_target
from moeopt.limits import LoadLimits
from moeopt.value_types import PyObject

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moeopt {moeopt.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="print the version and stop", callback=_print_version, is_eager=True)
]


@app.callback()
def every_command(version: Version = False) -> None:
    """Find the MoE blocks of a model, rewrite them into grouped-expert ops, and verify the result."""


app.command("inspect")(inspect_command)
app.command("profile")(profile_command)
app.command("passes")(passes_command)
app.command("plan")(plan_command)
app.command("schema")(schema_command)
app.command("triton")(triton_command)

TargetArgument = Annotated[str, typer.Argument(help=FORMS)]
BundleArgument = Annotated[Path, typer.Argument(help="a bundle that `moeopt optimize --out` wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
Trust = Annotated[bool, typer.Option(help="run the Python code that a Hugging Face directory brings")]
Html = Annotated[Path | None, typer.Option(help="write the report to this file as one HTML page")]
Task = Annotated[str | None, typer.Option(help="what a Hugging Face model is loaded for: " + ", ".join(TASKS))]
Seed = Annotated[int, typer.Option(help="of every random input, and of random weights")]


@app.command()
def optimize(
    target: TargetArgument,
    backend: Annotated[
        str | None, typer.Option(help="torch, onnxruntime or tensorrt; without it torch, for an ONNX file onnxruntime")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write a bundle to this directory")] = None,
    verify: Annotated[str | None, typer.Option(help="strict, fast or off")] = None,
    device: Annotated[str | None, typer.Option(help="where it shall run, like cpu or cuda:0")] = None,
    built_for: BuiltFor = None,
    dtype: Annotated[str | None, typer.Option(help="cast the model first, like bfloat16")] = None,
    tune: Annotated[bool, typer.Option(help="measure the lowerings on this machine")] = False,
    portable: Annotated[bool, typer.Option("--portable", help="an engine of ONNX's own operators only")] = False,
    html: Html = None,
    measure: Annotated[bool, typer.Option("--measure", help="with --html: time a call before and after")] = False,
    skip_passes: Annotated[str | None, typer.Option(help="passes that do not run, with commas between")] = None,
    only_passes: Annotated[str | None, typer.Option(help="the only passes that run, with commas between")] = None,
    print_passes: Annotated[bool, typer.Option("--print-passes", help="list what each pass did")] = False,
    quantize: QuantizeTo = None,
    limit: LimitTo = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="let --out replace a verified bundle unverified")
    ] = False,
    task: Task = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite a model's MoE blocks, verify them, and save the result with --out."""
    if html is not None:
        check_target(html)
    if measure and (html is None or device is not None or dtype is not None):
        raise UsageError("--measure adds to the page of --html, and compares like with like: without --device, --dtype")
    if backend is not None:
        check_backend(backend)
    found = find_target(target, task)
    backend = backend or ("torch" if found.onnx is None else "onnxruntime")
    given: dict[str, Any] = {
        "verify": verify, "device": device, "target": built_for, "dtype": dtype, "tune": tune, "seed": seed,
        "skip_passes": skip_passes and _names(skip_passes), "only_passes": only_passes and _names(only_passes),
        "print_passes": print_passes or None, "portable": portable or None, "quantize": quantize,
        "limit": as_limits(limit or ()) or None,
    }  # fmt: skip
    fields = {name: value for name, value in given.items() if value is not None}
    check_choice(backend, fields)
    if out is not None:
        check_out(out, found, verify, overwrite)
    stopped: Exception | None = None
    with opened_target(
        found, fields, loaded=measure, backend=backend, out=out, overwrite=overwrite, seed=seed, task=task,
        trust_remote_code=trust_remote_code, progress=_progress(quiet),
    ) as opened:  # fmt: skip
        from moeopt.progress import never_by_itself  # needs torch, which the target has brought by now

        with never_by_itself() if quiet else contextlib.nullcontext():
            optimized = _api().optimize(
                opened.model, opened.inputs, backend=backend, progress=_progress(quiet), **opened.fields
            )
            opened.check(optimized)
        if html is not None:  # before it is saved: a model that has no bundle form still has a report
            from moeopt.cli.measured import figures

            optimized.report.to_html(html, **(figures(opened.model, optimized) if measure else {}))
        if out is not None:
            stopped = opened.save(optimized, out, overwrite)
    _print_optimized(optimized, out if stopped is None else None, html, stopped, as_json)
    if stopped is not None:
        raise stopped
    _exit(optimized.certificate.passed, missed_words(optimized.certificate) or "not equivalent")


def _print_optimized(
    optimized: PyObject, saved: Path | None, html: Path | None, stopped: Exception | None, as_json: bool
) -> None:
    """Report and certificate, where they were saved, and what stopped the bundle."""
    if as_json:
        certificate = json.loads(optimized.certificate.to_json())
        body = {"report": optimized.report.to_dict(), "certificate": certificate, "saved": saved and str(saved)}
        _print_json(body if stopped is None else {**body, "not_saved": str(stopped)})
        return
    _show(optimized.report)
    print()
    _show(optimized.certificate)
    if saved:
        print(f"\nsaved: {saved}")
    if html is not None:
        print(f"\nhtml: {html}")


@app.command()
def explain(
    target: TargetArgument,
    html: Html = None,
    task: Task = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say which blocks would be rewritten, and why the others would not; changes nothing."""
    if html is not None:
        check_target(html)
    with opened_target(
        find_target(target, task), {}, trust_remote_code=trust_remote_code, seed=seed, task=task, alike=True,
        progress=False,
    ) as opened:  # fmt: skip
        _say_unless(quiet, f"explain: {target}")
        report = _api().explain(opened.model, opened.inputs)
        report = report if opened.streamed is None else opened.streamed.noted(report)
    if html is not None:
        report.to_html(html)
    if as_json:
        _print_json(report.to_dict())
    else:
        _show(report)
        if html is not None:
            print(f"\nhtml: {html}")


@app.command()
def verify(
    bundle: BundleArgument,
    original: Annotated[str | None, typer.Option(help="compare with this model too: " + FORMS)] = None,
    provider: Annotated[str | None, typer.Option(help="the runtime's execution provider")] = None,
    against: Annotated[Path | None, typer.Option(help="a stored certificate that it must not be worse than")] = None,
    seconds: Annotated[float | None, typer.Option(help="how long the bundle's runs may take")] = None,
    most_bytes: Annotated[float | None, typer.Option("--bytes", help="memory that the bundle's runs may take")] = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check a bundle again on this machine, without the original model or with it."""
    limits = LoadLimits(seconds, most_bytes)
    if against is not None:
        if original is not None:
            raise UsageError("--against compares a bundle with its past, --original with a model: give one of them")
        check_certificate(against)
        check_bundle(bundle)
        from moeopt.cli.verify_against import verify_against

        _say_unless(quiet, f"verify: {bundle} against {against}")
        _exit(verify_against(bundle, provider, against, as_json, limits), f"not equivalent, or worse than {against}")
        return
    check_bundle(bundle)
    fields: dict[str, Any] = {}
    if original is not None:
        fields["original"], fields["inputs"] = load_target(original, trust_remote_code=trust_remote_code, seed=seed)
    _say_unless(quiet, f"verify: {bundle}")
    certificate = _api().verify(bundle, provider=provider, limits=limits, **fields)
    if as_json:
        _print_json(json.loads(certificate.to_json()))
    else:
        _show(certificate)
    _exit(certificate.passed, missed_words(certificate) or "not equivalent")


@app.command()
def info(
    bundle: Annotated[Path | None, typer.Argument(help="a bundle; without one, this machine")] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine can run, or what a bundle holds."""
    from moeopt.cli.about import bundle_facts, machine_facts, print_facts

    facts = machine_facts() if bundle is None else bundle_facts(bundle)
    if as_json:
        _print_json(facts)
    else:
        print_facts(facts)


@app.command("build-kernels")
def build_kernels(as_json: AsJson = False) -> None:
    """Compile the native CPU kernel ahead of its first use, for every instruction set, and check it."""
    from moeopt.cli.about import print_facts
    from moeopt.ops.native.library import build_ahead

    path, said = build_ahead()
    if as_json:
        _print_json({"library": str(path), "instruction_sets": said})
    else:
        print_facts({"library": path, **said})


def _api() -> PyObject:
    return importlib.import_module("moeopt.api")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _progress(quiet: bool) -> PyObject:
    """None: a bar on a terminal, unless it was told to be quiet; elsewhere a line for each step."""
    if quiet or sys.stderr.isatty():
        return None
    return lambda line: print(line, file=sys.stderr, flush=True)


def _say_unless(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def _show(thing: PyObject) -> None:
    """With colours on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty() and hasattr(thing, "__rich__"):
        from rich.console import Console

        Console().print(thing)
    else:
        print(thing)


def _print_json(data: PyObject) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def _exit(passed: bool | None, why: str = "not equivalent") -> None:
    if passed is False:
        print(f"moeopt: {why}", file=sys.stderr)
        raise typer.Exit(1)

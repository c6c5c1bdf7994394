"""The commands themselves: read the words, call ``moeopt.api``, print, and set the exit code.

What needs torch is imported by the command that needs it, after the words were checked: help, the version and a
mistyped path shall not wait for seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import moeopt
from moeopt.cli.early import check_bundle, check_certificate
from moeopt.cli.examples import examples
from moeopt.cli.inspect_command import inspect_command
from moeopt.cli.limits import missed_words
from moeopt.cli.opened_target import opened_target
from moeopt.cli.optimize_command import optimize_command
from moeopt.cli.passes_command import passes_command
from moeopt.cli.plan_command import plan_command
from moeopt.cli.printing import api, exit_unless, print_json, say_unless, show
from moeopt.cli.profile_command import profile_command
from moeopt.cli.schema_command import schema_command
from moeopt.cli.target import FORMS, find_target, load_target
from moeopt.cli.triton_command import triton_command
from moeopt.cli.words import AsJson, BundleArgument, Html, Quiet, Seed, TargetArgument, Task, Trust
from moeopt.errors import UsageError
from moeopt.html import check_target
from moeopt.limits import LoadLimits
from moeopt.untrusted import shown

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


app.command("optimize", epilog=examples("optimize"))(optimize_command)
app.command("inspect", epilog=examples("inspect"))(inspect_command)
app.command("profile", epilog=examples("profile"))(profile_command)
app.command("passes")(passes_command)
app.command("plan", epilog=examples("plan"))(plan_command)
app.command("schema")(schema_command)
app.command("triton", epilog=examples("triton"))(triton_command)


@app.command(epilog=examples("explain"))
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
    found = find_target(target, task)
    say_unless(quiet, found.random_weights(seed))
    with opened_target(
        found, {}, trust_remote_code=trust_remote_code, seed=seed, task=task, alike=True,
        progress=False,
    ) as opened:  # fmt: skip
        say_unless(quiet, f"explain: {target}")
        report = api().explain(opened.model, opened.inputs)
        report = opened.noted(report)
    if html is not None:
        report.to_html(html)
    if as_json:
        print_json(report.to_dict())
    else:
        show(report)
        if html is not None:
            print(f"\nhtml: {shown(html)}")


@app.command(epilog=examples("verify"))
def verify(
    bundle: BundleArgument,
    original: Annotated[str | None, typer.Option(help="compare with this model too: " + FORMS)] = None,
    provider: Annotated[
        str | None,
        typer.Option(help="the runtime's provider, like cuda; without it cpu, or the one that an engine was built for"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="a stored certificate, like kept/certificate.json, that it must not be worse than"),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="how long the bundle's runs may take; without it, 10, and 1 for each 50 MB of the bundle"),
    ] = None,
    most_bytes: Annotated[
        float | None,
        typer.Option(
            "--bytes", help="memory that the bundle's runs may take; without it, 2 GiB, and 8 times the bundle"
        ),
    ] = None,
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

        say_unless(quiet, f"verify: {bundle} against {against}")
        exit_unless(
            verify_against(bundle, provider, against, as_json, limits), f"not equivalent, or worse than {against}"
        )
        return
    check_bundle(bundle)
    fields: dict[str, Any] = {}
    notes = []
    if original is not None:
        found = find_target(original)
        notes = [note] if (note := found.random_weights(seed)) else []
        fields["original"], fields["inputs"] = load_target(found, trust_remote_code=trust_remote_code, seed=seed)
    say_unless(quiet, f"verify: {bundle}")
    certificate = api().verify(bundle, provider=provider, limits=limits, **fields)
    if notes:
        certificate.notes += notes
    if as_json:
        print_json(json.loads(certificate.to_json()))
    else:
        show(certificate)
    exit_unless(certificate.passed, missed_words(certificate) or "not equivalent")


@app.command()
def info(
    bundle: Annotated[Path | None, typer.Argument(help="a bundle; without one, this machine")] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine can run, or what a bundle holds."""
    from moeopt.cli.about import bundle_facts, machine_facts, print_facts

    facts = machine_facts() if bundle is None else bundle_facts(bundle)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


@app.command("build-kernels")
def build_kernels(as_json: AsJson = False) -> None:
    """Compile the native CPU kernel ahead of its first use, for every instruction set, and check it."""
    from moeopt.cli.about import print_facts
    from moeopt.ops.native.library import build_ahead

    path, said = build_ahead()
    if as_json:
        print_json({"library": str(path), "instruction_sets": said})
    else:
        print_facts({"library": path, **said})

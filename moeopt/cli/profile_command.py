"""``moeopt profile``: how the user's own data load a model's experts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moeopt.bundle.manifest import is_bundle
from moeopt.cli.printing import say_unless
from moeopt.cli.target import FORMS, check_data, find_target, load_data, load_target
from moeopt.cli.words import Trust
from moeopt.errors import UsageError
from moeopt.html import check_target
from moeopt.untrusted import shown
from moeopt.value_types import PyObject

DATA = "module:function or file.py:function that returns batches (an iterable of inputs), or one call's inputs"


def profile_command(
    target: Annotated[str, typer.Argument(help=FORMS)],
    data: Annotated[str | None, typer.Option(help=DATA + "; without it, the inputs that come with the model")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with the heat map to this file")] = None,
    measure: Annotated[bool, typer.Option(help="time the experts as routed and balanced")] = True,
    seed: Annotated[int, typer.Option(help="of every random input, and of random weights")] = 0,
    trust_remote_code: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else")] = False,
) -> None:
    """Count how often each expert fires on data, how uneven that is, and what it costs."""
    if is_bundle(Path(target)):
        raise UsageError(f"{target} is a bundle, whose graph hides its routing: profile the model that it was made of")
    if html is not None:
        check_target(html)
    if data is not None:
        check_data(data)
    source = find_target(target)
    random = source.random_weights(seed)
    say_unless(quiet, random)
    model, inputs = load_target(source, trust_remote_code=trust_remote_code, seed=seed)
    from moeopt.profiling import profile  # needs torch, which the target has brought by now

    given: PyObject = inputs if data is None else load_data(data)
    say = None if quiet else lambda line: print(line, file=sys.stderr, flush=True)
    found = profile(model, given, measure=measure, seed=seed, progress=say)
    told = [random] if random else []
    if data is None and source.directory is not None:  # it brings no inputs of its own
        told.append("the inputs are random tokens: --data names your own")
    found = replace(found, notes=(*found.notes, *told))
    if html is not None:
        found.to_html(html)
    print(found.to_json() if as_json else found)
    if html is not None and not as_json:
        print(f"\nhtml: {shown(html)}")
    if not found.layers:
        print("moeopt: no block could be profiled", file=sys.stderr)
        raise typer.Exit(1)

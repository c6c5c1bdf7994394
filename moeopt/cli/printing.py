"""What commands print, where, and with which code they end."""

from __future__ import annotations

import importlib
import json
import sys

import typer

from moeopt.untrusted import shown
from moeopt.value_types import PyObject


def api() -> PyObject:
    return importlib.import_module("moeopt.api")


def names_in(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def progress(quiet: bool) -> PyObject:
    """None: a bar on a terminal, unless it was told to be quiet; elsewhere a line for each step."""
    if quiet or sys.stderr.isatty():
        return None
    return lambda line: print(shown(line), file=sys.stderr, flush=True)


def say_unless(quiet: bool, line: str) -> None:
    if line and not quiet:
        print(shown(line), file=sys.stderr, flush=True)


def show(thing: PyObject) -> None:
    """With colours on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty() and hasattr(thing, "__rich__"):
        from rich.console import Console

        Console().print(thing)
    else:
        print(thing)


def print_json(data: PyObject) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def exit_unless(passed: bool | None, why: str = "not equivalent") -> None:
    if passed is False:
        print(f"moeopt: {shown(why)}", file=sys.stderr)
        raise typer.Exit(1)

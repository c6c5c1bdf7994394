"""``moeopt passes``: the passes in the order in which they run, with their level and one line each."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Annotated, Any

import typer


def passes_command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else")] = False,
) -> None:
    """List the passes in the order in which they run: name, level, what each does."""
    rows = list_passes()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{width}}  {row['level']:8}  {row['does']}")
        for label in ("engines_only", "off"):
            if row[label]:
                print(f"{'':{width}}  {'':8}  {label.replace('_', ' ')}: {row[label]}")


def list_passes() -> list[dict[str, Any]]:
    """Name, level and first line of each pass of the pipeline, and the conditions under which it runs."""
    from moeopt.passes.pipeline import PIPELINE

    rows = []
    for one in PIPELINE:
        words = inspect.getdoc(sys.modules[type(one).__module__]) or ""
        rows.append(
            {
                "name": one.name,
                "level": one.level.value,
                "does": words.split("\n\n")[0].replace("\n", " "),
                "engines_only": getattr(one, "engines_only", ""),
                "off": getattr(one, "off", ""),
            }
        )
    return rows

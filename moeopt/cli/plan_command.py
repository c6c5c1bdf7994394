"""``moeopt plan``: a model's experts on a cluster, on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli.inspect_command import FORMS
from moeopt.cli.target import load_target
from moeopt.cli.words import Trust
from moeopt.value_types import PyObject


def plan_command(
    target: Annotated[str, typer.Argument(help=FORMS)],
    devices: Annotated[int, typer.Option(help="how many devices there are")],
    node: Annotated[int, typer.Option(help="devices of one node")] = 8,
    device: Annotated[str, typer.Option(help="a GPU by name, like H100-SXM")] = "H100-SXM",
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16, float16, fp8 or int4")] = "bfloat16",
    load: Annotated[Path | None, typer.Option(help="a file with what `moeopt profile --json` printed")] = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else")] = False,
) -> None:
    """Place a model's experts on a cluster: what fits, what is sent, where expert parallelism pays. Reads no weight."""
    from moeopt.planning import plan

    subject: PyObject = target
    if ":" in target and not Path(target).exists():
        subject, _ = load_target(target)
    found = plan(
        subject, devices=devices, node=node, device=device, dtype=dtype, load=load, trust_remote_code=trust_remote_code
    )
    print(found.to_json() if as_json else found)

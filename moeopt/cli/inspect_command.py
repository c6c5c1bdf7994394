"""``moeopt inspect``: what is in a model, before anything is done to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli.hugging_face import cached_directory
from moeopt.cli.target import load_target
from moeopt.cli.words import Trust
from moeopt.errors import UsageError
from moeopt.value_types import PyObject

FORMS = (
    "a Hugging Face directory, a config.json, a cached model's name, an .onnx file, module:factory or file.py:factory"
)


def inspect_command(
    target: Annotated[str, typer.Argument(help=FORMS)],
    batch: Annotated[int, typer.Option(help="sequences that run together")] = 1,
    prompt: Annotated[int, typer.Option(help="tokens of each sequence at prefill")] = 512,
    bits: Annotated[int, typer.Option(help="width of a weight for FLOPs and bytes: 32, 16, 8 or 4")] = 16,
    device: Annotated[str | None, typer.Option(help="a GPU by name, like H100; without it, this CPU, measured")] = None,
    top_k: Annotated[int | None, typer.Option(help="experts per token, where the model does not show it")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="bytes and bounds with the experts in a format: int8, int4, fp8, mxfp4, ...")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, and nothing else")] = False,
) -> None:
    """Count a model's experts and parameters, and say what it needs; reads no weight."""
    subject: PyObject = target
    if not Path(target).exists() and cached_directory(target) is None:
        if ":" not in target:
            raise UsageError(f"{target} does not exist: give {FORMS}")
        subject, _ = load_target(target)
    from moeopt.inspection import inspect

    found = inspect(
        subject, batch=batch, prompt=prompt, bits=bits, device=device, top_k=top_k,
        trust_remote_code=trust_remote_code, quantize=quantize,
    )  # fmt: skip
    print(found.to_json() if as_json else found)

"""What a command can know before it loads a model: loading and optimising may take hours, a wrong word need not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.cli.early import check_backend
from moeopt.cli.opened_target import streams
from moeopt.cli.target import CommandTarget
from moeopt.errors import UsageError


def check_choice(backend: str, fields: Mapping[str, Any]) -> None:
    """``UsageError`` for a backend, option, pass or device that is none or is not here, and for a missing package."""
    from moeopt.backends.choice import checked_choice
    from moeopt.options import Options

    checked_choice(backend, Options.from_fields(None, fields))


def chosen_backend(name: str | None, target: CommandTarget) -> str:
    """The backend that was asked for, or what a target without such a wish gets; ``UsageError`` where there is none."""
    if name is not None:
        check_backend(name)
    return name or ("torch" if target.onnx is None else "onnxruntime")


def check_out(out: Path, target: CommandTarget, verify: str | None, overwrite: bool) -> str:
    """The bundle that would be replaced at ``out``, in words; "" for none.

    Raises:
        UsageError: a bundle cannot be written there, or would replace what should stay.
    """
    from moeopt.bundle.destination import check_destination

    if target.directory is not None and out.resolve() == target.directory.resolve():
        raise UsageError(f"--out {out} is the model's own directory: give a new one")
    size = 0 if streams(target) else target.bytes  # what is streamed compares what it has written already, too
    return check_destination(out, verify != "off", overwrite, size)

"""``dump="folder"``: each block's witness, reading and program as text, to look at and to compare.

folder/00-model.layers.0.mlp/
    witness.txt     the block's own call, op by op: shapes, the module that ran it, your line of code
    reading.txt     what was recognised, or the reason why nothing was
    program.txt     what runs now, step by step (rewritten blocks)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from moeopt.drive.block import Call, Rewrite
from moeopt.drive.describe import describe_router
from moeopt.errors import CaptureError, UsageError
from moeopt.ir.kinds import op_name
from moeopt.ir.tape import Tape, record
from moeopt.rewrite.plan import Plan, Ref
from moeopt.rewrite.program import install, uninstall


class Dump:
    """Text files for every block of one run.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self._count = Path(folder), 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise UsageError(f"dump={str(folder)!r}: the folder cannot be made: {err.strerror or err}") from None

    def block(self, name: str, module: nn.Module, call: Call | None, rewrite: Rewrite | None, reason: str) -> None:
        """One block; ``call`` is None for a module that did not run."""
        files = {"reading.txt": f"declined: {reason}\n" if rewrite is None else _reading(rewrite)}
        if call is not None:
            if rewrite is not None:
                uninstall(module)
            try:
                files["witness.txt"] = "\n".join(_tape_lines(record(module, *call, keep_values=False))) + "\n"
            except CaptureError as err:
                files["witness.txt"] = f"it does not run alone: {err}\n"
            finally:
                if rewrite is not None:
                    install(module, rewrite.program)
        if rewrite is not None:
            files["program.txt"] = "\n".join(_plan_lines(rewrite.program.plan)) + "\n"
        safe = re.sub(r"[^\w.-]", "_", name)[:100]
        place = self.folder / f"{self._count:02d}-{safe}"
        self._count += 1
        try:
            place.mkdir(exist_ok=True)
            for file, text in files.items():
                (place / file).write_text(text, encoding="utf-8")
        except OSError as err:
            raise UsageError(f"dump={str(self.folder)!r}: {place} cannot be written: {err.strerror or err}") from None


def _tape_lines(tape: Tape) -> Iterator[str]:
    path, source = None, None
    for node in tape.nodes:
        call = tape.calls[node.meta["call"]].path if "call" in node.meta else ""
        if call != path:
            path = call
            yield f"# in {path or 'the block'}"
        if node.meta.get("source", source) != source:
            source = node.meta["source"]
            yield f"# {source}"
        shape = node.meta.get("shape")
        what = "" if shape is None else f": {str(node.meta.get('dtype', '')).removeprefix('torch.')}{list(shape)}"
        args = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        target = f"{node.target}" if node.op != "call_function" else f"{op_name(node)}({args})"
        yield f"{node.name}{what} = {target}"
    yield f"return {tape.output}"


def _reading(rewrite: Rewrite) -> str:
    parts = []
    for found, router in zip(rewrite.found, rewrite.routers, strict=True):
        parts += [
            f"experts   {len(found.experts)}, {found.frontier.per_token} for a token",
            f"function  {found.spec}",
            f"router    {describe_router(found, router)}",
            f"tokens    {found.tokens.node}",
            f"sum       {found.combine.node}",
            f"source    {found.source}",
            "",
        ]
    return "\n".join(parts)


def _plan_lines(plan: Plan) -> Iterator[str]:
    for number, step in enumerate(plan.steps):
        args = ", ".join([*map(_shown, step.args), *(f"{k}={_shown(v)}" for k, v in step.kwargs.items())])
        yield f"%{number} = {step.kind} {step.target}({args})" + (f"  # {step.source}" if step.source else "")
    for target, value in plan.mutations:
        yield f"write {_shown(value)} into {_shown(target)}"
    yield f"return {_shown(plan.output)}"


def _shown(value: Any) -> str:
    if isinstance(value, Ref):
        return f"%{value.step}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_shown(v)}' for k, v in value.items())}}}"
    return str(value)

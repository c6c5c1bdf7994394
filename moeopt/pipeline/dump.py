"""``dump="folder"``: each block's probe call, reading and program as text, to look at and to compare.

folder/00-model.layers.0.mlp/
    witness.txt     the block's own call, op by op: shapes, the module that ran it, your line of code
    reading.txt     what was recognised, or the reason why nothing was and whatever else stood in the way
    program.txt     what runs now, step by step (rewritten blocks)
    1-group_experts.before.graph, 1-group_experts.after.graph, 2-...
                    the graph around each pass that fired; before the first one, the recorded call

What an earlier run left in the folder goes first: its blocks would look like this run's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moeopt.capture.tape import record
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import CaptureError, UsageError
from moeopt.obstacles import Obstacle
from moeopt.pipeline.block import Rewrite
from moeopt.pipeline.describe import describe_router
from moeopt.rewrite.install import install, uninstall
from moeopt.rewrite.text import tape_lines, text

_OWN = "witness.txt", "reading.txt", "program.txt"


class Dump:
    """Text files for every block of one run.

    Raises:
        UsageError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self._count = Path(folder), 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in filter(Path.is_dir, self.folder.glob("[0-9][0-9]*-*")):
                _clear(path)
        except OSError as err:
            raise UsageError(
                f"dump={str(folder)!r}: the folder cannot be made or cleared: {err.strerror or err}"
            ) from None

    def block(
        self, name: str, module: nn.Module, call: ArgsKwargs | None, rewrite: Rewrite | None, reason: str,
        others: Sequence[Obstacle] = (),
    ) -> None:  # fmt: skip
        """One block; ``call`` is None for a module that did not run, ``others`` what was met besides ``reason``."""
        declined = "\n".join([f"declined: {reason}", *(f"also met: {o}" for o in others), ""])
        files = {"reading.txt": declined if rewrite is None else _reading(rewrite)}
        if call is not None:
            if rewrite is not None:
                uninstall(module)
            try:
                files["witness.txt"] = "\n".join(tape_lines(record(module, *call, keep_values=False))) + "\n"
            except CaptureError as err:
                files["witness.txt"] = f"it does not run alone: {err}\n"
            finally:
                if rewrite is not None:
                    install(module, rewrite.program)
        if rewrite is not None:
            files["program.txt"] = text(rewrite.program.block)
            files |= rewrite.passes.graphs
        safe = re.sub(r"[^\w.-]", "_", name)[:100]
        place = self.folder / f"{self._count:02d}-{safe}"
        self._count += 1
        try:
            place.mkdir(exist_ok=True)
            for file, words in files.items():
                (place / file).write_text(words, encoding="utf-8")
        except OSError as err:
            raise UsageError(f"dump={str(self.folder)!r}: {place} cannot be written: {err.strerror or err}") from None


def _clear(place: Path) -> None:
    """Remove a block's folder of an earlier run; what anybody else wrote there stays."""
    for path in place.iterdir():
        if path.name in _OWN or path.suffix == ".graph":
            path.unlink()
    if not any(place.iterdir()):
        place.rmdir()


def _reading(rewrite: Rewrite) -> str:
    parts = []
    for found, router in zip(rewrite.found, rewrite.routers, strict=True):
        parts += [
            f"experts   {len(found.experts)}, {found.routing.per_token} for a token",
            f"function  {found.spec}",
            f"router    {describe_router(found, router)}",
            f"tokens    {found.tokens.node}",
            f"sum       {found.combine.node}",
            f"source    {found.source}",
            "",
        ]
    return "\n".join(parts)

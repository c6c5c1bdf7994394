"""``hints={name pattern: ExpertsSpec or callable}``: the expert user's word on what an expert computes.

A hint replaces the fitting of the function between an expert's matmuls; everything else (rows,
weights, routing) is still read off the probe call, and the block is verified like any other, so a wrong
hint is declined and never believed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec


def hint_for(hints: Mapping[str, Any], path: str) -> ExpertsSpec | None:
    """The spec of the first hint whose pattern matches the module path ``path``; None where none does.

    Raises:
        UsageError: a hint is neither an ExpertsSpec nor a callable that returns one.
    """
    for pattern, hint in hints.items():
        if fnmatch.fnmatch(path, pattern):
            spec = hint(path) if callable(hint) else hint
            if not isinstance(spec, ExpertsSpec):
                raise UsageError(f"hints[{pattern!r}] gave {spec!r} for {path}; it must be an ExpertsSpec")
            return spec
    return None

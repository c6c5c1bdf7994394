"""The exception that refuses a call of a rewritten block, which the block's own code then answers."""

from __future__ import annotations

from typing import Any

from torch import nn

KeptResults = list[tuple[nn.Module, tuple[Any, ...], Any]]
"""(submodule, positional arguments, result) of each call."""


class Stale(Exception):
    """The module no longer is what was verified; the message says what changed.

    Attributes:
        results: of kept submodules that ran before the refusal; the block's own code takes these, and runs none twice.
    """

    results: KeptResults = []  # noqa: RUF012  # of a class, never written into

"""What stops a call of a rewritten block, so that the block's own code answers it."""

from __future__ import annotations

from typing import Any

from torch import nn

Gave = list[tuple[nn.Module, tuple[Any, ...], Any]]
"""What submodules gave for which positional arguments, call by call."""


class Stale(Exception):
    """The module no longer is what was verified; the message says what changed.

    Attributes:
        gave: what kept submodules gave before the call was stopped; the block's own code need not run them again.
    """

    gave: Gave = []  # noqa: RUF012  # of a class, never written into

"""No warnings from rewritten blocks inside a module that moeopt is trying to rewrite as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from moeopt.rewrite.install import rewritten_forward


@contextlib.contextmanager
def silent_refusals(module: nn.Module) -> Iterator[None]:
    """Silence the rewritten blocks in ``module``, and restore their records of refused calls afterwards.

    The trial runs in float64 and at other sizes, for which each inner block refuses its rewritten code and runs the
    original; a user who makes such a call is still warned.
    """
    blocks = [forward for child in module.modules() if (forward := rewritten_forward(child)) is not None]
    before = [(block.silent, block.last_refusal, block.fallbacks) for block in blocks]
    for block in blocks:
        block.silent = True
    try:
        yield
    finally:
        for block, (silent, refusal, fallbacks) in zip(blocks, before, strict=True):
            block.silent, block.last_refusal, block.fallbacks = silent, refusal, fallbacks

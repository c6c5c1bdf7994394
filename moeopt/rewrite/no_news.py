"""Calls that rewritten blocks refuse while moeopt tries the module around them: no news to the user, and not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from moeopt.rewrite.install import rewritten_forward


@contextlib.contextmanager
def no_news(module: nn.Module) -> Iterator[None]:
    """The rewritten blocks in ``module`` warn of nothing; what they refused meanwhile is told when a user meets it.

    A run in float64, or of other sizes, is refused by each of them and goes on in its own code.
    """
    inner = [forward for child in module.modules() if (forward := rewritten_forward(child)) is not None]
    before = [(one.silent, one.last_refusal, one.fallbacks) for one in inner]
    for one in inner:
        one.silent = True
    try:
        yield
    finally:
        for one, (silent, refusal, fallbacks) in zip(inner, before, strict=True):
            one.silent, one.last_refusal, one.fallbacks = silent, refusal, fallbacks

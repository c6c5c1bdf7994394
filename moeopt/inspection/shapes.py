"""Which matrices make a feed-forward network: told from their shapes alone.

Shapes: H hidden, I intermediate. A matrix counts with its two sizes in either order, since orientation differs.

    plain      {H, I}  {H, I}
    gated      {H, I}  {H, I}  {H, I}
    fused      {H, 2I} {H, I}
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FFN:
    """Sizes of one feed-forward network; H and I may be swapped where the shapes cannot tell."""

    hidden: int
    inner: int
    gated: bool

    @property
    def sizes(self) -> frozenset[int]:
        return frozenset((self.hidden, self.inner))

    def facing(self, width: int) -> FFN:
        """The same network with H = ``width`` if that is one of its two sizes."""
        return FFN(width, self.hidden, self.gated) if width == self.inner else self


def ffn_of(matrices: Iterable[tuple[int, ...]]) -> FFN | None:
    """The feed-forward network that these matrix shapes make, or None."""
    shapes = [tuple(m) for m in matrices]
    if not 2 <= len(shapes) <= 3 or any(min(s) < 2 for s in shapes):
        return None
    first, last = shapes[0], shapes[-1]
    if all(sorted(s) == sorted(first) for s in shapes):  # weights are (out, in) more often than not
        return FFN(first[1], first[0], len(shapes) == 3)
    return _fused(shapes) if len(shapes) == 2 and first != last else None


def _fused(shapes: list[tuple[int, ...]]) -> FFN | None:
    """Gate and up as one matrix. A square W_out is no proof: a fused query, key and value looks the same."""
    small, large = sorted(shapes, key=lambda s: s[0] * s[1])
    for hidden, inner in (small, small[::-1]):
        if sorted(large) == sorted((hidden, 2 * inner)):
            return FFN(hidden, inner, True)
    return None

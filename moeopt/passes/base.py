"""What a pass is: a value with a name, a level and ``apply``; and what is written down of each time one ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

from moeopt.rewrite.block_graph import BlockGraph


class Level(str, Enum):
    """How far a pass may change numbers."""

    EXACT = "exact"
    """The same bits."""
    ROUNDING = "rounding"
    """The same function; sums or products run in another order or place."""
    LOSSY = "lossy"
    """Another function, near the first; never unless asked for by name."""

    def __str__(self) -> str:
        return self.value


class Pass(Protocol):
    """One rewrite of a block graph. The pass manager copies the block before, and checks and verifies it after.

    A pass may also have two attributes, each a sentence: ``engines_only``, why a block that PyTorch runs is left
    alone, and ``off``, why it does not run unless named in ``only_passes``. A lossy pass that was asked for in another
    way has ``asked``, which is then True.
    """

    name: str
    level: Level

    def apply(self, block: BlockGraph) -> int:
        """Change ``block`` in place and return how many times the rewrite fired.

        Raises:
            Declined: with the reason and the place; the block is then as it was before.
        """
        ...


@dataclass(frozen=True)
class PassRecord:
    """One pass on one block.

    Args:
        name: of the pass.
        level: exact, rounding or lossy.
        block: the block's module path.
        fired: how many times; 0 where it found nothing to do, declined, was skipped or was reverted.
        reason: why it did not fire or did not stay, a sentence; "" where it fired, or had nothing to do.
        seconds: of the pass itself, its verification not counted.
        before, after: how many nodes of each op there were; equal where the pass did not stay.
        verified: whether the block was verified with what the pass made of it.
    """

    name: str
    level: Level
    block: str
    fired: int = 0
    reason: str = ""
    seconds: float = 0.0
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    verified: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", Level(self.level))

    def reverted(self, why: str) -> PassRecord:
        """The record of a pass that fired and did not stay."""
        return replace(self, fired=0, after=self.before, verified=False, reason=f"reverted: {why}")

    def printed(self, wanted: bool | Sequence[str]) -> bool:
        """Whether ``print_passes=wanted`` asks for it."""
        return wanted if isinstance(wanted, bool) else self.name in wanted

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {
            "name": self.name, "level": self.level.value, "block": self.block, "fired": self.fired,
            "reason": self.reason, "seconds": self.seconds if math.isfinite(self.seconds) else 0.0,
            "before": dict(self.before), "after": dict(self.after), "verified": self.verified,
        }  # fmt: skip

    def __str__(self) -> str:
        what = f"fired {self.fired}" if self.fired else "left it"
        nodes = f", {sum(self.before.values())} -> {sum(self.after.values())} nodes" if self.fired else ""
        proof = ("" if self.verified else ", not verified") if self.fired else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.name} ({self.level}) on {self.block}: {what}{nodes}{proof}, {1e3 * self.seconds:.0f} ms{why}"

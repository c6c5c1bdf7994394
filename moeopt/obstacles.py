"""What stands in the way of rewriting a block: each obstacle that was met, and which of them decides.

A block is looked for at several levels: the module of the experts alone, the module around it that holds the router,
and so on outwards; at each level several readings are tried. Every failure is an :class:`Obstacle`. One of them is the
reason that the report shows:

1. of the levels up to the one that holds the router (what is further out is no part of the block, and another model
   has something else there);
2. the innermost obstacle that names a cause (``FOUND`` or ``FORBIDS``): what stands in the way inside also stands in
   the way of everything around it;
3. where none names a cause, the one of highest rank, then the one of the latest stage, then the innermost.

The latest stage alone would not do: an inner module that is read almost to the end may fail only because its router is
outside, where the forward draws random numbers.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class Rank(enum.IntEnum):
    """How much an obstacle says of the block; the higher rank decides."""

    INTERNAL = 0
    """A failure of moeopt's own."""
    PROBE = 1
    """The block could not be watched: a made-up call failed, or missed an expert."""
    READING = 2
    """Something was looked for and not found."""
    FOUND = 3
    """Something was found that the rewritten block would not carry."""
    FORBIDS = 4
    """No rewritten block could be the same: random numbers, state of earlier calls, weights without values."""


class Stage(enum.IntEnum):
    """How far the attempt had come."""

    RUN = 0
    EXPERTS = 1
    FUNCTION = 2
    SUM = 3
    ROUTING = 4
    REWRITE = 5


@dataclass(frozen=True)
class Obstacle:
    """One thing that stood in the way.

    Args:
        reason: a sentence for the model's owner: what it is, and the way round it.
        where: the user's source line, "" where none is known.
        module: path of the module that was looked at, "" for the model.
        rank, stage: how much it says, and how far the attempt had come.
    """

    reason: str
    where: str = ""
    module: str = ""
    rank: Rank = Rank.FOUND
    stage: Stage = Stage.REWRITE

    def __str__(self) -> str:
        at = f" (at {self.where})" if self.where else ""
        return f"{self.module or 'the model'}, {self.stage.name.lower()}: {self.reason}{at}"

    def to_dict(self) -> dict[str, str]:
        """Plain JSON types only."""
        return {
            "reason": self.reason, "where": self.where, "module": self.module, "rank": self.rank.name.lower(),
            "stage": self.stage.name.lower(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Obstacle:
        """The inverse of :meth:`to_dict`; ``KeyError`` for a rank or a stage that there is not."""
        rank, stage = Rank[data["rank"].upper()], Stage[data["stage"].upper()]
        return cls(data["reason"], data["where"], data["module"], rank, stage)


def decisive(levels: Iterable[Iterable[Obstacle]]) -> Obstacle | None:
    """The obstacle that decides; None where none was met.

    Args:
        levels: what was met at each level of modules that is part of the block, innermost first.
    """
    best: Obstacle | None = None
    for met in levels:
        here = max(met, key=_weight, default=None)
        if here is not None and here.rank >= Rank.FOUND:
            return here
        if here is not None and (best is None or _weight(here) > _weight(best)):
            best = here
    return best


def _weight(obstacle: Obstacle) -> tuple[Rank, Stage]:
    return obstacle.rank, obstacle.stage


def distinct(obstacles: Iterable[Obstacle]) -> tuple[Obstacle, ...]:
    """The first of each reason."""
    first: dict[str, Obstacle] = {}
    for obstacle in obstacles:
        first.setdefault(obstacle.reason, obstacle)
    return tuple(first.values())

"""The obstacles that were met while one block was looked for, by module, and the one that the report shows."""

from __future__ import annotations

import dataclasses

from moeopt.errors import Declined
from moeopt.find.block_candidates import BlockCandidate
from moeopt.obstacles import Obstacle, Rank, decisive, distinct


class ObstaclesMet:
    """Filled while the modules around ``place`` are tried, innermost first."""

    def __init__(self, place: BlockCandidate) -> None:
        self.place = place
        self._levels: dict[str, list[Obstacle]] = {}

    def add(self, module: str, err: Declined) -> None:
        """Add the obstacle that ended the attempt on the module at the path ``module``."""
        obstacles = [err.obstacle, *err.others]
        self._levels.setdefault(module, []).extend(
            dataclasses.replace(o, module=module, where=o.where or self.place.source) for o in obstacles
        )

    def caused_inside(self, path: str) -> bool:
        """Whether one of the block's own levels named a cause, and the module at ``path`` is none of these."""
        own = self.place.own_levels()
        return path not in own and any(o.rank >= Rank.FOUND for inside in own for o in self._levels.get(inside, ()))

    def decide(self) -> Obstacle | None:
        """The obstacle that the report shows; None where nothing was tried."""
        inside = [obstacles for path, obstacles in self._levels.items() if path in self.place.own_levels()]
        deciding = decisive(inside)
        if deciding is None or deciding.rank <= Rank.PROBE:
            # the block could not be recorded alone: a module around it may name the cause
            outside = {level.path for level in self.place.levels[: self.place.apart]}
            around = [obstacles for path, obstacles in self._levels.items() if path in outside]
            deciding = decisive(around) or decisive(self._levels.values()) or deciding
        return deciding

    def others(self) -> tuple[Obstacle, ...]:
        """The obstacles other than the deciding one, each reason once."""
        deciding = self.decide()
        obstacles = distinct(o for level in self._levels.values() for o in level)
        return tuple(o for o in obstacles if deciding is None or o.reason != deciding.reason)

"""Every obstacle that was met while one block was looked for, level by level, and the one that its report shows."""

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
        """What ended the attempt on the module at the path ``module``."""
        found = [err.obstacle, *err.others]
        self._levels.setdefault(module, []).extend(
            dataclasses.replace(o, module=module, where=o.where or self.place.source) for o in found
        )

    def decide(self) -> Obstacle | None:
        """The obstacle that the report shows; None where nothing was tried."""
        own = [met for path, met in self._levels.items() if path in self.place.own_levels()]
        found = decisive(own)
        if found is None or found.rank <= Rank.PROBE:  # the block could not be watched alone: what holds it may tell
            apart = {level.path for level in self.place.levels[: self.place.apart]}
            near = [met for path, met in self._levels.items() if path in apart]
            found = decisive(near) or decisive(self._levels.values()) or found
        return found

    def others(self) -> tuple[Obstacle, ...]:
        """All but the one that decides, each reason once."""
        first = self.decide()
        every = distinct(o for met in self._levels.values() for o in met)
        return tuple(o for o in every if first is None or o.reason != first.reason)

"""What verifying a block gives: the calls it was verified on, what each showed, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Case:
    """One call of a block: ``original(*args, **kwargs)``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class CaseResult:
    """What one case showed. Distances are the largest over tokens; ``tokens`` is how many were judged.

    ``distance_exact`` is that of the rewritten code run in float64; None where it could not run so.
    ``ids_seen``: the different expert ids chosen, by the last of the routing choices over the most experts.
    ``rerounded``: how many tokens were judged by the original as it is when it is rounded otherwise.
    """

    name: str
    status: Literal["passed", "failed", "skipped"] = "passed"
    reason: str = ""
    tokens: int = 0
    distance_original: float = 0.0
    distance_rewritten: float = 0.0
    distance_exact: float | None = None
    required: float = 0.0
    ids_compared: int = 0
    ties: int = 0
    flips: int = 0
    ids_seen: list[int] = field(default_factory=list)
    rerounded: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class BlockCheck:
    """The verdict on one block.

    ``required`` is the factor that would have been needed in place of FACTOR (0: eps alone covers it).
    ``passed`` is None when nothing was checked (verify="off").
    """

    name: str
    passed: bool | None
    cases: list[CaseResult] = field(default_factory=list)
    reason: str = ""
    dtype: str = ""
    seconds: float = 0.0

    @property
    def required(self) -> float:
        return max((case.required for case in self.cases), default=0.0)

    @property
    def distance_original(self) -> float:
        return max((case.distance_original for case in self.cases), default=0.0)

    @property
    def distance_rewritten(self) -> float:
        return max((case.distance_rewritten for case in self.cases), default=0.0)

    @property
    def distance_exact(self) -> float | None:
        return max((case.distance_exact for case in self.cases if case.distance_exact is not None), default=None)

    @property
    def ids_compared(self) -> int:
        return sum(case.ids_compared for case in self.cases)

    @property
    def experts_seen(self) -> int:
        """How many different experts the cases reached, as far as recorded choices tell (0: they do not)."""
        return len(set().union(*(case.ids_seen for case in self.cases)))

    @property
    def ties(self) -> int:
        return sum(case.ties for case in self.cases)

    @property
    def flips(self) -> int:
        return sum(case.flips for case in self.cases)


class Fail(Exception):
    """A case failed; the text says why."""

"""Lists of names in a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first ``most`` names with commas between, and how many more there are: ``a, b, c and 4 more``."""
    all_names = [str(name) for name in names]
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(all_names[:most]) + more


def arguments(positional: Collection[object], named: Iterable[str]) -> str:
    """The arguments of a call as its caller gave them: ``2 by position, mask``; ``nothing``."""
    count = [f"{len(positional)} by position"] if positional else []
    return ", ".join([*count, *sorted(named)]) or "nothing"

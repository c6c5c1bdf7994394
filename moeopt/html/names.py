"""Names beside a picture: what tells them apart."""

from __future__ import annotations

import os


def short_names(names: list[str]) -> list[str]:
    """Module paths without the parts that all of them begin and end with."""
    parts = [name.split(".") for name in names]
    if len(names) < 2:
        return names
    head = len(os.path.commonprefix(parts))  # works on any sequences
    tail = len(os.path.commonprefix([p[: head - 1 if head else None : -1] for p in parts]))
    short = [".".join(p[max(head - 1, 0) : len(p) - tail]) for p in parts]
    return short if all(short) and len(set(short)) == len(set(names)) else names

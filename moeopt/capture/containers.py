"""The lists, dicts and sets that modules hold: what is in them now, and how that is put back into the same objects."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection
from operator import is_
from typing import Any

from torch import nn

CONTAINERS = (list, dict, set, OrderedDict, defaultdict, Counter, deque)
"""Of these exact types; the tables of ``nn.Module`` (parameters, submodules, hooks) are among them."""
REGISTRIES = ("_parameters", "_buffers", "_modules")
HOOK_TABLES = tuple(n for n, v in vars(nn.Module()).items() if type(v) in CONTAINERS and n not in REGISTRIES)
"""Code that installs hooks at its first call (transformers' recorders do) also sets a flag for it: both go back."""


def same_items(now: Collection[Any], before: Collection[Any]) -> bool:
    """The same names or items, in the same order, for the same objects."""
    if len(now) != len(before) or not all(map(is_, now, before)):
        return False
    return not isinstance(now, dict) or not isinstance(before, dict) or all(map(is_, now.values(), before.values()))


def put_back(container: Any, before: Collection[Any]) -> None:  # noqa: ANN401  # of a type of CONTAINERS
    """Let ``container`` hold what its copy ``before`` does."""
    if not same_items(container, before):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(before)

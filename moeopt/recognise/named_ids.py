"""Ids (T, K) from numbers that name the experts otherwise than by 0, 1, 2: keys of a dict, domains, languages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeopt.recognise.routing_types import Extraction


def places_of(named_TK: torch.Tensor, names: Sequence[int]) -> torch.Tensor:
    """(T, K) the place of each number among ``names``; E, which names no expert, for any other number."""
    ids_TK = torch.full_like(named_TK, len(names), dtype=torch.long)
    for place, name in enumerate(names):
        ids_TK = torch.where(named_TK == name, place, ids_TK)
    return ids_TK


def are_named(ids: Extraction | None) -> bool:
    """Whether the ids are places that :func:`places_of` gave."""
    return ids is not None and any(op is places_of for op, _ in ids.steps)

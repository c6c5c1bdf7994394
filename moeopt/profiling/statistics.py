"""Measures of imbalance from a block's counts, each beside what chance alone would give.

    max/mean   load of the busiest expert over the mean load; 1 is balance, E / K the most
    cv         standard deviation of the loads over their mean; 0 is balance
    entropy    of the loads' shares, over log E; 1 is balance, 0 one expert for all
    chance     with p = fired slots / (T E), tokens that choose uniformly and independently give
               cv = sqrt((1 - p) / (T p)) and E (1 - p)^T experts that no token reaches

Dead: not fired once. Hot: more than ``HOT`` times the mean load.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

HOT = 2.0


def imbalance(fired_E: Tensor, tokens: int) -> dict[str, Any] | None:
    """The measures of the module's docstring, as plain values; None where no slot fired."""
    loads, E = fired_E.double(), fired_E.numel()
    total = float(loads.sum())
    if not total:
        return None
    mean = total / E
    share = loads / total
    spread = -float((share * share.clamp_min(1e-300).log()).sum())
    p = min(total / (tokens * E), 1.0)
    relative = (loads / mean).tolist()
    return {
        "mean": mean,
        "max_over_mean": max(relative),
        "cv": float(loads.std(correction=0)) / mean,
        "entropy": spread / math.log(E) if E > 1 else 1.0,
        "dead": [e for e, r in enumerate(relative) if r == 0],
        "hot": [e for e, r in enumerate(relative) if r > HOT],
        "by_chance": {"cv": math.sqrt((1 - p) / (tokens * p)), "dead": E * (1 - p) ** tokens},
    }


def top_pairs(together_EE: Tensor, limit: int = 5) -> list[dict[str, Any]]:
    """The pairs of experts that most tokens fire together; ``over_mean`` is against the mean of all pairs."""
    E = together_EE.shape[0]
    upper = together_EE.triu(1)
    total = int(upper.sum())
    if not total:
        return []
    counts, at = upper.reshape(-1).topk(min(limit, E * (E - 1) // 2))
    mean = total / (E * (E - 1) / 2)
    return [
        {"experts": [i // E, i % E], "tokens": n, "over_mean": n / mean}
        for n, i in zip(counts.tolist(), at.tolist(), strict=True)
        if n
    ]

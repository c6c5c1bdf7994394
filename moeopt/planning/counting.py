"""Expected counts under uniform routing: experts that a batch hits, ranks and nodes that a token reaches.

E experts, K chosen per token, T tokens, P ranks; every set of K different experts is as likely as another.
"""

from __future__ import annotations

import math


def experts_hit(E: int, K: int, T: int) -> float:
    """How many of E experts some of T tokens choose."""
    return E * (1 - (1 - K / E) ** T)


def owners_reached(E: int, K: int, P: int) -> float:
    """How many of P owners hold one of a token's K: 1 - C(E - n, K) / C(E, K) for each owner of n experts.

    E % P owners have one expert more than the others, which have none where there are more owners than experts.
    """
    fewer, more = divmod(E, P)
    kinds = ((fewer, P - more), (fewer + 1, more))
    return sum(count * (1 - math.comb(E - n, K) / math.comb(E, K)) for n, count in kinds if count)


def most_held(E: int, P: int) -> float:
    """The part of all experts that the owner of most of them has."""
    return -(-E // P) / E


def remote_owners(E: int, K: int, P: int) -> float:
    """The same without the token's own owner, which is one of the P at random; 0 for one owner."""
    return owners_reached(E, K, P) * (P - 1) / P


def busiest(mean: float, chance: float = 0.0) -> float:
    """The largest of many counts of that mean: 2.5 standard deviations above it.

    Args:
        chance: of each thing that is counted; 0 for counts of many unlikely things, as Poisson's are.
    """
    return mean + 2.5 * math.sqrt(mean * (1 - chance))

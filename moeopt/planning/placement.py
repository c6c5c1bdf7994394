"""Where the experts go: for each expert the ranks that hold it, its copies included.

E experts, P ranks in nodes. Loads are counts of tokens; what a placement is worth is judged by :func:`busiest_rank`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Placement = list[list[int]]
"""For each expert, the ranks that hold it; a token's rows go to the copies in equal shares."""


def contiguous(E: int, P: int) -> Placement:
    """Neighbouring experts on one rank; the first E mod P ranks hold one more."""
    ends = np.cumsum([E // P + (rank < E % P) for rank in range(P)])
    return [[int(np.searchsorted(ends, e, side="right"))] for e in range(E)]


def balanced(load: Sequence[float], P: int) -> Placement:
    """Longest processing time first: the heaviest expert to the lightest rank that has room for one more."""
    return packed([(e, w) for e, w in enumerate(load)], len(load), P)


def with_copies(load: Sequence[float], P: int, extra: int) -> Placement:
    """``extra`` copies, each of the expert with the largest load a copy, then packed as :func:`balanced` does.

    This is the policy of DeepSeek's EPLB for one group of devices.
    """
    return packed(_copies(range(len(load)), load, extra, P), len(load), P)


def together(load: Sequence[float], pairs: np.ndarray, P: int, node: int, extra: int = 0) -> Placement:
    """Experts that one token often chooses in one node, under nearly equal loads; inside a node as :func:`with_copies`.

    Args:
        load: tokens of each of the E experts.
        pairs: (E, E) tokens that chose both.
        P, node: ranks, and ranks of a node; P must be a multiple of ``node``.
        extra: copies in all, the same number in each node.
    """
    nodes, E = P // node, len(load)
    if nodes == 1:
        return with_copies(load, P, extra)
    groups = _groups(np.asarray(load, float), np.asarray(pairs, float), nodes)
    placement: Placement = [[] for _ in range(E)]
    for number, members in enumerate(groups):
        inside = packed(_copies(members, load, extra // nodes, node), E, node)
        for e in members:
            placement[e] = [number * node + rank for rank in inside[e]]
    return placement


def packed(copies: list[tuple[int, float]], E: int, P: int) -> Placement:
    """(expert, load) pairs on P ranks with equal room; copies of an expert on ranks of their own where there is one."""
    room = -(-len(copies) // P)
    loads, held = [0.0] * P, [0] * P
    placement: Placement = [[] for _ in range(E)]
    for e, weight in sorted(copies, key=lambda c: -c[1]):
        free = [r for r in range(P) if held[r] < room]
        rank = min([r for r in free if r not in placement[e]] or free, key=lambda r: (loads[r], r))
        placement[e].append(rank)
        loads[rank] += weight
        held[rank] += 1
    return placement


def busiest_rank(placement: Placement, load: Sequence[float], P: int) -> float:
    """Load of the busiest rank over the mean: the time of a step over that of an even one."""
    loads = [0.0] * P
    for ranks, weight in zip(placement, load, strict=True):
        for rank in ranks:
            loads[rank] += weight / len(ranks)
    mean = sum(loads) / P
    return max(loads) / mean if mean else 1.0


def _copies(members: Iterable[int], load: Sequence[float], extra: int, P: int) -> list[tuple[int, float]]:
    """(expert, load a copy) pairs; no expert has more copies than there are ranks, unless all have."""
    count = {e: 1 for e in members}
    for _ in range(extra):
        count[max(count, key=lambda e: (count[e] < P, load[e] / count[e], -e))] += 1
    return [(e, load[e] / n) for e, n in count.items() for _ in range(n)]


def _groups(load: np.ndarray, pairs: np.ndarray, nodes: int, slack: float = 1.03) -> list[list[int]]:
    """Experts into ``nodes`` groups of nearly equal size: greedily to the most shared tokens, then by swaps."""
    E = len(load)
    room, cap = -(-E // nodes), slack * load.sum() / nodes
    pairs = pairs.copy()
    np.fill_diagonal(pairs, 0)
    home, size, weight = np.full(E, -1), np.zeros(nodes, int), np.zeros(nodes)
    shared = np.zeros((E, nodes))
    for e in np.argsort(-load, kind="stable"):
        free = np.flatnonzero((size < room) & (weight + load[e] <= cap))
        free = free if len(free) else np.flatnonzero(size < room)
        group = max(free, key=lambda g: (shared[e, g] / max(weight[g], 1.0), -weight[g]))
        home[e], shared[:, group] = group, shared[:, group] + pairs[e]
        size[group] += 1
        weight[group] += load[e]
    _swap(home, shared, weight, load, pairs, cap)
    return [[int(e) for e in np.flatnonzero(home == group)] for group in range(nodes)]


def _swap(
    home: np.ndarray, shared: np.ndarray, weight: np.ndarray, load: np.ndarray, pairs: np.ndarray, cap: float
) -> None:
    """Exchange two experts of two groups as long as that keeps more pairs together and no group above ``cap``."""
    E = len(home)
    for a in range(E):
        own = shared[a, home[a]]
        gain = shared[a][home] + shared[np.arange(E), home[a]] - own - shared[np.arange(E), home] - 2 * pairs[a]
        gain[home == home[a]] = -np.inf
        for b in np.argsort(-gain, kind="stable")[:8]:
            if gain[b] <= 0:
                break
            ga, gb = home[a], home[b]
            after = weight[ga] - load[a] + load[b], weight[gb] - load[b] + load[a]
            if max(after) <= max(cap, weight[ga], weight[gb]):
                shared[:, ga] += pairs[:, b] - pairs[:, a]
                shared[:, gb] += pairs[:, a] - pairs[:, b]
                home[a], home[b], weight[ga], weight[gb] = gb, ga, after[0], after[1]
                break

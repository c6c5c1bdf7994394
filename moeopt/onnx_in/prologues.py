"""Where chains begin that each have a prologue of their own: a norm, a scale, a shift of rows that all of them read.

    h -> Norm_0 -> W_in_0 -> ... -> W_out_0
    h -> Norm_1 -> W_in_1 -> ... -> W_out_1        the rows of the products differ, and h is what they are made of

A prologue has no product with weights in it, and is a few nodes long.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from moeopt.onnx_in.index import GraphIndex
from moeopt.value_types import OnnxValue

_LONGEST = 16
"""Nodes of a prologue: a norm that is written out is nine."""


def ancestors(index: GraphIndex, rows: OnnxValue, products: Collection[int]) -> Iterator[OnnxValue]:
    """The values that ``rows`` is a function of alone, constants left out, the nearest first.

    Args:
        products: positions of the nodes where the walk ends: no prologue has one.
    """
    waiting = {id(rows): rows}
    todo = [(-index.at(rows), id(rows))]
    for _ in range(_LONGEST):
        at, key = heapq.heappop(todo)
        del waiting[key]
        if at > 0 or -at in products:  # above 0: an input of the graph
            return
        index.visited += 1
        for read in index.reads(index.nodes[-at]):
            if not index.is_constant(read) and not index.is_size(read) and id(read) not in waiting:
                waiting[id(read)] = read
                heapq.heappush(todo, (-index.at(read), id(read)))
        if not waiting:
            return
        if len(waiting) == 1:
            yield next(iter(waiting.values()))


def shared_beginnings(
    index: GraphIndex, rows: Sequence[OnnxValue], products: Collection[int]
) -> list[OnnxValue | None]:
    """For the rows of each chain the nearest value that most of the others are made of too; None where none is."""
    lists = [list(ancestors(index, one, products)) for one in rows]
    counts = Counter(id(v) for found in lists for v in {id(v): v for v in found}.values())
    best = [max(found, key=lambda v: counts[id(v)], default=None) for found in lists]
    return [v if v is not None and counts[id(v)] > 1 else None for v in best]

"""Where a region begins and ends: the values through which everything goes that its chains read or give.

Forward from the chains, nodes are walked in the graph's order; when one value is all that is still to be read, all of
what the chains gave has gone through it: it is an *exit*. The nodes between the chains' root and an exit are the
region; what they read from elsewhere, constants left out, are further entries. Each walk stops soon behind the chains,
so the search stays linear in the graph.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeopt.onnx_in.index import GraphIndex
from moeopt.value_types import OnnxNode, OnnxValue

MOST_EXITS = 8
_ROOM = 512
"""Nodes that a walk may look at beside those of its chains, and as often again as these."""
_SEQUENCES = frozenset(
    ("SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap", "SplitToSequence")
)
"""Operators whose result is several tensors."""


@dataclass(frozen=True)
class GraphRegion:
    """Nodes between entries and one exit.

    Attributes:
        nodes: in topological order, those included that make a weight of constants, or zeros of a size.
        entries: the values that it reads and does not make, the root first; constants are not among them.
        exit: the value that it is there for.
        folds: whether the views of its weights are made once, as its weights lie in several shapes.
        shares: whether several of its experts have one weight, which is several to be read.
        apart: results of products that are all experts at once, and taken apart to be read, with how many these are.
    """

    nodes: tuple[OnnxNode, ...]
    entries: tuple[OnnxValue, ...]
    exit: OnnxValue
    folds: bool = False
    apart: tuple[tuple[str, int], ...] = ()
    shares: bool = False


def exits(index: GraphIndex, seeds: Iterable[int], room: int) -> list[OnnxValue]:
    """Up to ``MOST_EXITS`` values that all of the results of the nodes at ``seeds`` go through, the nearest first."""
    todo = sorted(set(seeds))
    furthest, seen = todo[-1], set(todo)
    expires: Counter[int] = Counter()
    alive = 0
    found: list[OnnxValue] = []
    while todo and room > 0 and len(found) < MOST_EXITS:
        at = heapq.heappop(todo)
        room -= 1
        index.visited += 1
        alive -= expires.pop(at, 0)
        fresh = []
        for value in index.nodes[at].outputs:
            readers = index.readers(value)
            if readers or id(value) in index.ends:
                fresh.append(value)
                alive += 1
                expires[len(index.nodes) if id(value) in index.ends else readers[-1]] += 1
            for reader in readers:
                if reader not in seen:
                    seen.add(reader)
                    heapq.heappush(todo, reader)
        if at >= furthest and alive == 1 and len(fresh) == 1 and is_tensor(fresh[0]):
            found.append(fresh[0])
    return found


def is_tensor(value: OnnxValue) -> bool:
    """Whether a value is one tensor, as far as the graph says, and no sequence of several."""
    node = value.producer()
    made = "" if node is None else node.op_type
    return type(value.type).__name__ not in ("SequenceType", "OptionalType") and made not in _SEQUENCES


def region_between(index: GraphIndex, *roots: OnnxValue, exit_: OnnxValue) -> GraphRegion:
    """The nodes that compute ``exit_`` and depend on one of the ``roots``, and what else they read."""
    start, end = min(map(index.at, roots)), index.at(exit_)
    behind = set(map(id, roots))
    for at in range(start + 1, end + 1):
        node = index.nodes[at]
        if any(id(v) in behind for v in index.reads(node)):
            behind |= {id(v) for v in node.outputs}
    index.visited += end - start
    chosen: set[int] = set()
    entries: dict[int, OnnxValue] = {id(root): root for root in roots}
    todo = [exit_]
    while todo:
        value = todo.pop()
        if id(value) in entries:
            continue
        at = index.at(value)
        if index.is_constant(value):
            if at >= 0 and at not in chosen:
                chosen.add(at)
                todo += index.reads(index.nodes[at])
            continue
        if (id(value) not in behind and not index.is_fill(value)) or at < 0:
            entries[id(value)] = value
            continue
        if at not in chosen:
            chosen.add(at)
            index.visited += 1
            todo += index.reads(index.nodes[at])
    return GraphRegion(tuple(index.nodes[at] for at in sorted(chosen)), tuple(entries.values()), exit_)


def steps_for(products: Sequence[object]) -> int:
    """How many nodes a walk from so many products may look at."""
    return _ROOM + 64 * len(products)


def common_entry(index: GraphIndex, values: Sequence[OnnxValue], room: int) -> OnnxValue | None:
    """The nearest value that all of ``values`` depend on alone, constants left out; None where none is near."""
    waiting = {id(v): v for v in values}
    while len(waiting) > 1 and room > 0:
        key = max(waiting, key=lambda k: index.at(waiting[k]))
        at = index.at(waiting.pop(key))
        if at < 0:
            return None
        room -= 1
        index.visited += 1
        waiting |= {id(v): v for v in index.reads(index.nodes[at]) if not index.is_constant(v)}
    return next(iter(waiting.values())) if len(waiting) == 1 else None

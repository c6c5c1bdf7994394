"""Routing that holds for whole groups of tokens: one row of ids or weights for each sequence, each image, or the call.

    tokens (B, L, H)    ids (B, K)    weights (B, K)
    tokens (L, B, H)    the same: sequences lie behind one another in the second axis

Where every token of a group went to the same experts by the same weights, one token of each stands for it: the usual
searches look for the routing of those tokens, and what they find is repeated for the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.tape import Tape
from moeopt.recognise.routing_by_columns import by_flags_apart
from moeopt.recognise.routing_by_ids import by_ids
from moeopt.recognise.routing_by_tables import by_choice, by_dense, by_flags, by_mask
from moeopt.recognise.routing_types import Extraction, Routing, Search, Table

aten = torch.ops.aten
_SEARCHES: tuple[Search, ...] = (by_ids, by_mask, by_dense, by_choice, by_flags, by_flags_apart)


def by_sequences(shape: tuple[int, ...], axis: int) -> Search:
    """A search among tensors with a row for each group of tokens.

    Args:
        shape: of the tensor of tokens, whose first axes, in turn, are those of the groups; or its last ones.
        axis: its feature axis.
    """
    sizes = [size for d, size in enumerate(shape) if d != axis]
    groupings = [(math.prod(sizes[:d]), math.prod(sizes[d:]), False) for d in range(len(sizes))]
    groupings += [(math.prod(sizes[d:]), math.prod(sizes[:d]), True) for d in range(1, len(sizes))]

    def search(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
        for groups, each, last in groupings:
            if each < 2 or groups * each != len(table.visits):
                continue
            firsts = _firsts(table, each, last)
            if firsts is None:
                continue
            for usual in _SEARCHES:
                for found in usual(tape, before, firsts, dtype):
                    ids = None if found.ids is None else _repeated(tape, found.ids, each, last)
                    weights = _repeated(tape, found.weights, each, last)
                    yield dataclasses.replace(found, ids=ids, weights=weights, of_groups=True)

    return search


def _firsts(table: Table, each: int, last: bool) -> Table | None:
    """The table of the first of every ``each`` tokens; None where others of a group differ from it.

    Args:
        last: whether the groups are the last axis, so that a group's tokens do not lie side by side.
    """
    sizes = (each, -1) if last else (-1, each)
    visits, weights = (t.unflatten(0, sizes).movedim(int(last), 0) for t in (table.visits, table.weights))
    if not bool((visits == visits[:, :1]).all()) or not bool((weights == weights[:, :1]).all()):
        return None
    return dataclasses.replace(table, visits=visits[:, 0], weights=weights[:, 0])


def _repeated(tape: Tape, extraction: Extraction, each: int, last: bool) -> Extraction:
    """``extraction`` with each of its rows ``each`` times. Ids that a step takes are repeated already."""
    if extraction.source is None:
        return extraction
    at = next((i for i, (_, rest) in enumerate(extraction.steps) if "@ids" in rest), len(extraction.steps))
    steps = extraction.steps
    columns = dataclasses.replace(extraction, steps=steps[:at]).run(tape).shape[1]
    again = [
        (aten.unsqueeze.default, (0 if last else 1,)),
        (aten.expand.default, ([each, -1, -1] if last else [-1, each, -1],)),
        (aten.reshape.default, ([-1, columns],)),
    ]
    return dataclasses.replace(extraction, steps=[*steps[:at], *again, *steps[at:]])


def repeated_here(tape: Tape, extraction: Extraction, tokens: int) -> Extraction:
    """``extraction``, found in another call, with its rows repeated as often as this call's ``tokens`` ask for."""
    ops = [op for op, _ in extraction.steps]
    at = ops.index(aten.expand.default) if aten.expand.default in ops else 0
    if at < 1 or ops[at - 1] is not aten.unsqueeze.default:
        return extraction
    first, again, rest = extraction.steps[: at - 1], extraction.steps[at][1][0], extraction.steps[at + 1 :]
    groups = len(dataclasses.replace(extraction, steps=first).run(tape))
    each = [tokens // groups if size > 0 else size for size in again] if groups else again
    return dataclasses.replace(
        extraction, steps=[*first, extraction.steps[at - 1], (aten.expand.default, (each,)), *rest]
    )

"""Other numberings of a block's experts than the order of their Parameters, told by the columns of a table.

    table[:, 0] weighs expert d, table[:, 1] expert a, ...

The Parameters of a file are in the order in which its nodes speak of them, and optimisers of graphs turn that order; so
may a model whose list of experts is not the order of its columns. Asked where the order of the Parameters fits nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.tape import Tape
from moeopt.recognise.routing_candidates import table_readings
from moeopt.recognise.routing_types import Extraction, Table

_NEAR = 1e-5
"""Of the largest mark: how near those of one column are, and how far at least those of two."""


def renumbered(tape: Tape, before: list[fx.Node], table: Table) -> Iterator[Table]:
    """``table`` in each other numbering by which its columns are those of a node, (T, E) or a turn of that."""
    tokens, experts = table.visits.shape
    tried = {tuple(table.natural)}
    for node in reversed(before):
        shape = node.meta.get("shape")
        if node.op == "get_attr" or not shape or math.prod(shape) != tokens * experts or not tokens:
            continue
        for steps, _ in table_readings(shape, tokens, experts):
            value = Extraction(node, steps).run(tape)
            for want in (table.weights, table.chosen) if value.shape == table.visits.shape else ():
                order = _order(value, want)
                if order is not None and tuple(order) not in tried:
                    tried.add(tuple(order))
                    yield dataclasses.replace(table, natural=order)


def _order(value_TE: torch.Tensor, want_TE: torch.Tensor) -> list[int] | None:
    """For each column of the first the one of the second that is the same; None where they are not the same columns,
    or several are alike."""
    by_row = torch.linspace(1, 2, len(want_TE), dtype=torch.float64)
    (a, from_a), (b, from_b) = ((by_row @ table.double()).sort() for table in (value_TE, want_TE))
    near = _NEAR * float(b.abs().max())
    if not bool(((a - b).abs() <= near).all()) or not bool((b.diff() > 2 * near).all()):
        return None
    order = torch.empty_like(from_a)
    order[from_a] = from_b
    found: list[int] = order.tolist()
    return found

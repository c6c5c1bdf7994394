"""Which tensors may hold a routing, the orders of axes that they are read in, and what a reading rebuilds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.recognise.routing_types import INTEGERS, KEEP_ORDER, UNWRITTEN, Extraction, Steps, Table, fits_table

aten = torch.ops.aten


def axis_orders(shape: tuple[int, ...], tokens: int, k: int) -> list[Steps]:
    """Ways to read T*K entries as (T, K): token-major, then slot-major."""
    straight: Steps = [(aten.reshape.default, ([-1, k],))]
    if tuple(shape) == (tokens, k):
        straight = []
    slots_first: Steps = [
        (aten.reshape.default, ([k, -1],)),
        (aten.t.default, ()),
    ]
    return [straight] if k == 1 else [straight, slots_first]


def possible_sources(before: list[fx.Node], *, floating: bool) -> Iterator[fx.Node]:
    for node in before:
        dtype = node.meta.get("dtype")
        if dtype is None or not node.meta["shape"] or node.op == "get_attr" or op_name(node) in UNWRITTEN:
            continue
        if (dtype.is_floating_point if floating else dtype in INTEGERS) and not dtype.is_complex:
            yield node


def reread_nodes(possible: list[fx.Node]) -> set[fx.Node]:
    """Candidates whose entries another one before them holds in the same order: read as (T, K) they say the same."""
    shown = set(possible)
    return {
        n
        for n in possible
        if op_name(n) in KEEP_ORDER
        and (source := n.args[0]) in shown
        and source.meta["dtype"] == n.meta["dtype"]  # type: ignore[union-attr]
        and math.prod(source.meta["shape"]) == math.prod(n.meta["shape"])  # type: ignore[union-attr]
    }


def rebuilt(ids: torch.Tensor, weights: torch.Tensor, mapping: list[int], candidates: int) -> torch.Tensor:
    """The (T, C) table that ids and weights stand for; ids beyond the experts name nothing."""
    out = torch.zeros(ids.shape[0], candidates, dtype=torch.float64)
    candidate = torch.tensor([*mapping, -1])[ids.clamp(max=len(mapping))]
    for k in range(ids.shape[1]):
        keep = candidate[:, k] >= 0
        rows = torch.arange(ids.shape[0])[keep]
        out.index_put_((rows, candidate[keep, k]), weights[keep, k].double(), True)
    return out


def exactly_rebuilt(made: torch.Tensor, table: Table) -> bool:
    return torch.equal(made.to(table.weights.dtype), table.weights)


def constant_weights(value: float, table: Table) -> Extraction:
    return Extraction(None, [(aten.to.dtype, (table.weights.dtype,)), (aten.full_like.default, (value,))])


def constant_weight(ids: torch.Tensor, mapping: list[int], table: Table) -> float | None:
    """The one weight that every visit has (hard routing, or weights applied later), or None. A token may visit an
    expert several times (two hashes that meet), which then enters the sum as often."""
    visited = table.chosen if bool((table.visits > 0).all()) else table.visits > 0
    once = visited & (table.visits == table.visits.masked_fill(~visited, table.visits.max()).min())
    values = (table.weights / table.visits)[once]
    if not values.numel() or not bool((values == values[0]).all()):
        return None
    value = float(values[0])
    full = torch.full(ids.shape, value, dtype=torch.float64)
    return value if fits_table(rebuilt(ids, full, mapping, table.visits.shape[1]), table) else None


def table_readings(shape: tuple[int, ...], tokens: int, experts: int) -> Iterator[tuple[Steps, int]]:
    """Ways to read T*E entries as (T, E): each axis of size E may be the expert axis, the last first."""
    for axis in sorted((d for d, s in enumerate(shape) if s == experts), reverse=True):
        steps: Steps = []
        if axis != len(shape) - 1:
            steps.append((aten.movedim.int, (axis, -1)))
        if len(shape) != 2:
            steps.append((aten.reshape.default, ([-1, experts],)))
        yield steps, axis
    if experts not in shape or len(shape) == 1:
        yield [(aten.reshape.default, ([-1, experts],))], -1


CASTS = ("_to_copy", "to", "type_as")


def asked_positive(node: fx.Node, depth: int = 6) -> bool:
    """True where the dispatch asks a table, or parts of it, ``> 0``: unlike ``!= 0``, that is false for a NaN."""
    for user in node.users:
        if op_name(user) == "gt" and user.args[0] is node and user.args[1] == 0:
            return True
        if depth and user.op == "call_function" and moves_rows(user) and asked_positive(user, depth - 1):
            return True
    return False

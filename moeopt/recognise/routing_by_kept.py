"""Routing of which a mask keeps a part: integers that name more experts than serve a token, and who of them does.

    for e, expert in enumerate(experts):
        token, slot = torch.where((ids == e) & keep)          top-p: ids are a whole order, keep its first entries

    ids_TK, keep_TK  ->  where(keep, ids, E)                  E adds nothing

A mask may hold one entry for each token (padding) as well.

Legend: T tokens, K ids of each, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.tape import Tape
from moeopt.recognise.ids_of_masks import kept_ids
from moeopt.recognise.routing_by_ids import IdRecipe, by_ids
from moeopt.recognise.routing_candidates import axis_orders, possible_sources, reread_nodes
from moeopt.recognise.routing_types import Extraction, Routing, RoutingForm, Table

MOST_PAIRS = 256
"""Pairs of integers and a mask that are tried."""


def by_kept(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
    """As :func:`~moeopt.recognise.routing_by_ids.by_ids`, of integers beside a mask."""
    for found in by_ids(tape, before, table, dtype, _kept_recipes):
        yield dataclasses.replace(found, form=RoutingForm.TABLE)  # how many serve a token differs


def _kept_recipes(tape: Tape, before: list[fx.Node], table: Table) -> Iterator[IdRecipe]:
    tokens, experts = table.visits.shape
    seen = (table.visits > 0)[:, torch.tensor(table.natural)]
    if not tokens or bool((table.visits > 1).any()):
        return
    masks = _different(tape, [n for n in before if _is_mask(n) and math.prod(n.meta["shape"]) >= tokens])
    possible = list(possible_sources(before, floating=False))
    reread, tried = reread_nodes(possible), 0
    for node in reversed(possible):
        size = math.prod(node.meta["shape"])
        if node in reread or not size or size % tokens or size // tokens > max(experts, 64):
            continue
        low, high = (int(v) for v in torch.aminmax(tape.value(node)))
        if low < 0 or not table.reached - 1 <= high < experts:
            continue
        for order in axis_orders(node.meta["shape"], tokens, size // tokens):
            for mask in masks:
                if math.prod(mask.meta["shape"]) not in (size, tokens) or tried > MOST_PAIRS:
                    continue
                tried += 1
                slots_first = len(order) > 1 and math.prod(mask.meta["shape"]) == size
                step = (kept_ids, ("@beside", experts, slots_first))
                extraction = Extraction(node, [(torch.ops.aten.to.dtype, (torch.int64,)), *order, step], (mask,))
                ids = extraction.run(tape)
                named = torch.zeros(tokens, experts + 1, dtype=torch.bool).scatter_(1, ids, True)[:, :experts]
                if torch.equal(named, seen):
                    yield extraction, ids, table.natural


def _is_mask(node: fx.Node) -> bool:
    return node.meta.get("dtype") == torch.bool and bool(node.meta.get("shape")) and node.op != "get_attr"


def _different(tape: Tape, nodes: list[fx.Node]) -> list[fx.Node]:
    """The last node of each value, those that are set everywhere or nowhere left out.

    The dispatch reads the last: what was added to a mask (a padding that has none here) may show on other tokens.
    """
    found: dict[bytes, fx.Node] = {}
    for node in nodes:
        value = tape.value(node)
        if bool(value.any()) and not bool(value.all()):
            found[value.reshape(-1).cpu().numpy().tobytes()] = node
    return list(found.values())

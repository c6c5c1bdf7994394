"""A router whose answer is one vector a slot: the ids, the weights or both of a token never stand in one tensor.

GShard's top-2 gate takes an argmax, masks the winner, and takes another; Tutel keeps a list of K vectors of weights
and adds slot by slot. Each vector has one entry per token:

    ids        slot 0: (T,)   slot 1: (T,)  ...     every token's visits, each once
    weights    slot 0: (T,)   slot 1: (T,)  ...     the weight of each id, in the same order

Legend: T tokens, C candidates (experts), K slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.tape import Tape
from moeopt.recognise.routing_by_ids import id_recipes
from moeopt.recognise.routing_candidates import rebuilt
from moeopt.recognise.routing_types import Extraction, Routing, RoutingForm, Table, same_values

aten = torch.ops.aten

MOST_SLOTS, MOST_VECTORS = 16, 10
"""Slots of a token, and vectors of ids among which they are looked for."""


def by_slots(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
    """Every reading by which each slot's weights are a vector; for :func:`~moeopt.recognise.routing.find_routing`.

    Weights that are the same for all tokens of the probe are left to others: their vector cannot be told by values.
    """
    visits = table.visits.sum(1)
    k = int(visits[0]) if len(visits) else 0
    if not 2 <= k <= MOST_SLOTS or bool((visits != k).any()) or bool((table.visits > 1).any()):
        return
    if k == table.visits.shape[1]:
        return
    tensors = (found for found in id_recipes(tape, before, table) if found[1].shape[1] == k)
    for extraction, ids, mapping in itertools.chain(tensors, _id_vectors(tape, before, table, k)):
        vectors = _weight_vectors(tape, before, table, dtype, ids, mapping)
        if vectors is not None:
            yield Routing(k, extraction, Extraction(vectors[0], [], tuple(vectors[1:])), mapping, RoutingForm.IDS)


def _vectors(
    tape: Tape, before: list[fx.Node], tokens: int, *, floating: bool
) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """Tensors of T entries that are computed from the input, and those entries."""
    for node in before:
        dtype, shape = node.meta.get("dtype"), node.meta.get("shape")
        if dtype is None or not shape or math.prod(shape) != tokens or node.op == "get_attr":
            continue
        if dtype.is_floating_point if floating else dtype in (torch.int64, torch.int32):
            yield node, tape.value(node).reshape(-1)


def _id_vectors(
    tape: Tape, before: list[fx.Node], table: Table, k: int
) -> Iterator[tuple[Extraction, torch.Tensor, list[int]]]:
    """K vectors of integers that name each token's experts, each once, the first that hold them."""
    tokens, candidates = table.visits.shape
    seen = table.visits[:, table.natural] > 0
    found: list[tuple[fx.Node, torch.Tensor]] = []
    for node, value in _vectors(tape, before, tokens, floating=False):
        ids = value.long()
        inside = bool(((ids >= 0) & (ids < candidates)).all())
        if inside and bool(seen.gather(1, ids[:, None]).all()) and not any(torch.equal(ids, v) for _, v in found):
            found.append((node, ids))
    for chosen in itertools.combinations(found[:MOST_VECTORS], k):
        ids = torch.stack([v for _, v in chosen], 1)
        if torch.equal(torch.zeros_like(seen).scatter(1, ids, True), seen):
            nodes = [n for n, _ in chosen]
            yield Extraction(nodes[0], [(aten.to.dtype, (torch.int64,))], tuple(nodes[1:])), ids, table.natural


def _weight_vectors(
    tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None, ids: torch.Tensor, mapping: list[int]
) -> list[fx.Node] | None:
    """For each slot the last tensor that holds its weights, all of one dtype; None where one of them has none."""
    tokens, candidates = table.visits.shape
    if int(ids.min()) < 0 or int(ids.max()) >= len(mapping):
        return None
    want = table.weights.gather(1, torch.tensor(mapping)[ids])
    if bool((want == want[:1, :1]).all()):
        return None
    vectors = list(_vectors(tape, before, tokens, floating=True))[::-1]
    for wanted in dict.fromkeys([dtype, *(n.meta["dtype"] for n, _ in vectors)]):
        of_dtype = [(n, v) for n, v in vectors if n.meta["dtype"] == wanted]
        nodes = [next((n for n, v in of_dtype if same_values(v, want[:, slot])), None) for slot in range(ids.shape[1])]
        chosen = [n for n in nodes if n is not None]
        if len(chosen) == len(nodes):
            weights = torch.stack([tape.value(n).reshape(-1) for n in chosen], 1)
            if same_values(rebuilt(ids, weights, mapping, candidates).to(table.weights.dtype), table.weights):
                return chosen
    return None

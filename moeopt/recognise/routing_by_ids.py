"""Routing that the model holds as ids (T, K), with weights or a table of scores beside the ids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows, op_name
from moeopt.capture.replay import descendants
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.named_ids import places_of
from moeopt.recognise.routing_candidates import (
    axis_orders,
    constant_weight,
    constant_weights,
    exactly_rebuilt,
    possible_sources,
    rebuilt,
    reread_nodes,
    table_readings,
)
from moeopt.recognise.routing_types import INTEGERS, Extraction, Routing, RoutingForm, Table, fits_table

aten = torch.ops.aten


IdRecipe = tuple[Extraction, torch.Tensor, list[int]]
MOST_NAMES = 64
"""Experts that are told apart by names, each of which is compared with every id."""


def id_recipes(tape: Tape, before: list[fx.Node], table: Table) -> Iterator[IdRecipe]:
    """(extraction, ids (T, K), candidate of each id) for every integer tensor that names the chosen experts."""
    tokens, candidates = table.visits.shape
    possible = list(possible_sources(before, floating=False))
    reread = reread_nodes(possible)
    counted = _as_many_as_chosen(tape)
    for node in sorted(reversed(possible), key=lambda n: n in counted):
        numel = math.prod(node.meta["shape"])
        if node in reread or not tokens or numel % tokens or not numel:
            continue
        k = numel // tokens
        if k > max(candidates, 64):
            continue
        low, high = (int(v) for v in torch.aminmax(tape.value(node)))
        # too few values to name every expert, or noise
        if low < 0 or not table.reached - 1 <= high < 4 * candidates + 64:
            continue
        for steps in axis_orders(node.meta["shape"], tokens, k):
            extraction = Extraction(node, steps)
            ids = extraction.run(tape).long()
            mapping = _mapping(ids, table)
            if mapping is not None:
                extraction = _rooted_ids(tape, extraction, ids)
                if extraction.source is not None and extraction.source.meta["dtype"] != torch.int64:
                    extraction.steps.append((aten.to.dtype, (torch.int64,)))
                yield extraction, ids, mapping


def by_names(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
    """As :func:`by_ids`, of integers that name the experts by other numbers than 0, 1, 2 (the keys of a dict), or of a
    flag for each token that says which of two experts it has."""
    return by_ids(tape, before, table, dtype, _named_recipes)


def _named_recipes(tape: Tape, before: list[fx.Node], table: Table) -> Iterator[IdRecipe]:
    tokens = len(table.visits)
    flags = [n for n in before if n.meta.get("dtype") == torch.bool and math.prod(n.meta["shape"]) == tokens]
    for node in itertools.chain(possible_sources(before, floating=False), flags):
        size = math.prod(node.meta["shape"])
        if not tokens or not size or size % tokens or size // tokens > min(table.visits.shape[1], MOST_NAMES):
            continue
        names, flag = tape.value(node).unique().tolist(), node.meta["dtype"] == torch.bool
        if not 2 <= len(names) <= MOST_NAMES or len(names) != table.reached:
            continue
        if names == list(range(len(names))) and not flag:
            continue
        for steps in axis_orders(node.meta["shape"], tokens, size // tokens):
            extraction = Extraction(node, [*steps, (places_of, ([int(name) for name in names],))])
            ids = extraction.run(tape)
            if (mapping := _mapping(ids, table)) is not None:
                yield extraction, ids, mapping


def ids_of_sequences(tape: Tape, before: list[fx.Node], table: Table) -> Declined | None:
    """The reason where integers name the experts of each sequence (B of them), and none those of each token."""
    tokens = len(table.visits)
    for node in possible_sources(before, floating=False):
        shape = node.meta["shape"]
        count = math.prod(shape)
        for slots in dict.fromkeys((1, shape[-1] if shape else 1)):
            sequences = count // slots if slots else 0
            if not 1 < sequences < tokens or tokens % sequences or int(tape.value(node).min()) < 0:
                continue
            ids = tape.value(node).reshape(-1, slots).long().repeat_interleave(tokens // sequences, 0)
            if int(ids.max()) < 4 * table.visits.shape[1] and _mapping(ids, table) is not None:
                many, dim = ("one id", "") if slots == 1 else (f"{slots} ids", ", 0")
                return Declined(
                    f"its experts are chosen for whole sequences, by {many} each, and the op takes the ids of each "
                    "token; flatten the sequences to rows, and repeat each id for its tokens "
                    f"(ids.repeat_interleave(x.shape[1]{dim}))",
                    node.meta.get("source", ""),
                )
    return None


def unserved_ids(tape: Tape, before: list[fx.Node], table: Table) -> Declined | None:
    """The reason where integers name each expert that ran, for all of its tokens, and others that no expert has."""
    tokens = len(table.visits)
    seen = {tuple(column) for column in (table.visits > 0).T.tolist() if any(column)}
    for node in possible_sources(before, floating=False):
        size = math.prod(node.meta["shape"])
        if not tokens or not size or size % tokens or size // tokens > MOST_NAMES or len(seen) < 2:
            continue
        names = tape.value(node).unique().tolist()
        if not len(seen) < len(names) <= MOST_NAMES:
            continue
        for steps in axis_orders(node.meta["shape"], tokens, size // tokens):
            ids = Extraction(node, list(steps)).run(tape)
            named = {name: tuple((ids == name).any(1).tolist()) for name in names}
            if seen <= set(named.values()):
                left = ", ".join(str(name) for name, rows in named.items() if rows not in seen)
                elsewhere = {rows for rows in named.values() if rows not in seen} & _picked(tape, tokens)
                if elsewhere:
                    return Declined(
                        f"its experts are of different kinds (the rows of the ids {left} go to other calls than those "
                        "of its alike experts), and the op runs one function on all of them; give all the same layers, "
                        "or route to each group of alike experts by a block of its own",
                        node.meta.get("source", ""),
                    )
                return Declined(
                    f"its router chooses ids that no expert serves ({left}), whose tokens get nothing for them, and "
                    "the op needs an expert for each id: give these ids experts too, with weights of zero",
                    node.meta.get("source", ""),
                )
    return None


def _picked(tape: Tape, tokens: int) -> set[tuple[bool, ...]]:
    """Which of the ``tokens`` each lookup of rows picks from a tensor of all of them."""
    found = set()
    for node in tape.nodes:
        given = node.all_input_nodes
        if op_name(node) not in ("index", "index_select", "masked_select") or len(given) != 2:
            continue
        rows, place = given[0].meta["shape"], tape.value(given[1])
        if rows[:1] == (tokens,) and place.dim() == 1 and place.dtype in (*INTEGERS, torch.bool):
            picked = torch.zeros(tokens, dtype=torch.bool)
            picked[place] = True
            found.add(tuple(picked.tolist()))
    return found


def _as_many_as_chosen(tape: Tape) -> set[fx.Node]:
    """Tensors whose size is data (the places that are not zero): K entries a token on this probe call alone."""
    starts = [n for n in tape.nodes if op_name(n) in ("nonzero", "masked_select")]
    return {*starts, *descendants(tape, starts)} if starts else set()


def _mapping(ids: torch.Tensor, table: Table) -> list[int] | None:
    """candidate of each id value, such that every visit is named by an id, and every id in range is a visit."""
    experts = table.visits.shape[1]
    seen = table.visits > 0
    values = torch.unique(ids)
    if values.numel() < table.reached:
        return None
    named = torch.zeros(ids.shape[0], max(int(values.max()) + 1, experts), dtype=torch.bool)
    named.scatter_(1, ids, True)
    natural = torch.tensor(table.natural)
    if torch.equal(named[:, :experts], seen[:, natural]) or _covers(
        named[:, :experts], seen[:, natural], table, natural
    ):
        return table.natural
    return _learnt(named, seen, table)


def _learnt(named: torch.Tensor, seen: torch.Tensor, table: Table) -> list[int] | None:
    """The candidate whose tokens include those of each id; every id must have one, every visit an id."""
    both = named.t().float() @ seen.float()
    size = named.sum(0).float()[:, None]
    fits = (both == size) & (size > 0)
    exact = fits & (both == seen.sum(0).float())
    choice = torch.where(exact.sum(1, keepdim=True) == 1, exact, fits)
    if not bool((choice.sum(1) == 1).all()):
        return None
    mapping: list[int] = choice.to(torch.uint8).argmax(1).tolist()
    if len(mapping) != max(table.num_named, seen.shape[1]) or set(mapping) != set(range(seen.shape[1])):
        return None
    union = torch.zeros_like(seen)
    for v, c in enumerate(mapping):
        union[:, c] |= named[:, v]
    return mapping if torch.equal(union, seen) else None


def _covers(named: torch.Tensor, seen: torch.Tensor, table: Table, natural: torch.Tensor) -> bool:
    """Dense forms let every expert see every token: there the chosen ones (weight not 0) must be named.

    Capacity drops: a named expert may not have seen the token; then nothing else may have.
    """
    chosen = table.chosen[:, natural]
    if bool(seen.all()):
        return torch.equal(named & chosen, chosen) and int(named.sum(1).max()) < seen.shape[1]
    extra = named & ~seen
    return bool((~(seen & ~named)).all()) and bool(seen.any()) and int(extra.sum()) * 2 < int(named.sum())


def by_ids(
    tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None,
    recipes: Callable[[Tape, list[fx.Node], Table], Iterator[IdRecipe]] = id_recipes,
) -> Iterator[Routing]:  # fmt: skip
    tokens, candidates = table.visits.shape
    possible = list(possible_sources(before, floating=True))
    reread = reread_nodes(possible)
    counted: set[fx.Node] | None = None
    for extraction, ids, mapping in recipes(tape, before, table):
        k = ids.shape[1]
        best: list[tuple[tuple[bool, bool, bool, int], Extraction]] = []
        for node in possible:
            numel = math.prod(node.meta["shape"])
            preferred = dtype is None or node.meta["dtype"] == dtype
            if numel == tokens * k and node not in reread:
                for steps in axis_orders(node.meta["shape"], tokens, k):
                    weights = Extraction(node, steps)
                    made = rebuilt(ids, weights.run(tape), mapping, candidates)
                    if fits_table(made, table):
                        best.append(((preferred, True, exactly_rebuilt(made, table), node.meta["index"]), weights))
                        break
            if numel == tokens * candidates and int(ids.max()) < candidates:
                for steps, _ in table_readings(node.meta["shape"], tokens, candidates):
                    weights = Extraction(node, [*steps, (aten.gather.default, (1, "@ids"))])
                    made = rebuilt(ids, weights.run(tape, ids), mapping, candidates)
                    if fits_table(made, table):
                        best.append(((preferred, False, exactly_rebuilt(made, table), node.meta["index"]), weights))
                        break
            elif numel == tokens and k > 1:
                weights = Extraction(node, [(aten.reshape.default, ([-1, 1],)), (aten.expand.default, ([-1, k],))])
                made = rebuilt(ids, weights.run(tape), mapping, candidates)
                if fits_table(made, table):
                    best.append(((preferred, False, exactly_rebuilt(made, table), node.meta["index"]), weights))
        constant = constant_weight(ids, mapping, table)
        if len(best) > 1:  # rows that an expert picked hold all weights where it happened to get all tokens
            counted = _as_many_as_chosen(tape) if counted is None else counted
            best.sort(key=lambda b: (b[0][0], b[1].source not in counted, *b[0][1:]), reverse=True)
        for _, weights in best if constant is not None else best[:1]:  # equal constants are many: each is asked
            yield Routing(k, extraction, _rooted(tape, weights, ids, mapping, table), mapping, RoutingForm.IDS)
        if constant is not None and not table.weighed:
            yield Routing(k, extraction, constant_weights(constant, table), mapping, RoutingForm.IDS_ALONE)


def _rooted_ids(tape: Tape, extraction: Extraction, ids: torch.Tensor) -> Extraction:
    """The same ids where they are first written down; see :func:`_rooted`."""
    node = extraction.source
    while node is not None and moves_rows(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        shape = node.meta.get("shape")
        if shape is None:
            continue
        if math.prod(shape) != ids.numel() or node.op == "get_attr" or node.meta["dtype"] not in INTEGERS:
            break
        for steps in axis_orders(shape, *ids.shape):
            attempt = Extraction(node, steps)
            if torch.equal(attempt.run(tape).long(), ids):
                extraction = attempt
                break
    return extraction


def _rooted(tape: Tape, extraction: Extraction, ids: torch.Tensor, mapping: list[int], table: Table) -> Extraction:
    """The same weights where they are first written down: copies and reshapes of them are dispatch.

    Only pure movement is undone: an earlier tensor that merely is equal on this probe call may not be on
    another.
    """
    node, best = extraction.source, extraction

    def exact(weights: Extraction) -> bool:
        return exactly_rebuilt(rebuilt(ids, weights.run(tape), mapping, table.visits.shape[1]), table)

    if any(op in (aten.gather.default, aten.expand.default) for op, _ in extraction.steps):
        return extraction
    while node is not None and moves_rows(node) and len(node.all_input_nodes) == 1:
        parent = node.all_input_nodes[0]
        same = parent.meta.get("dtype") == node.meta.get("dtype") and parent.op != "get_attr"
        if not same or math.prod(parent.meta.get("shape") or (0,)) != math.prod(node.meta["shape"]):
            break
        node = parent
        tokens = table.visits.shape[0]
        for steps in axis_orders(node.meta["shape"], tokens, math.prod(node.meta["shape"]) // max(tokens, 1)):
            attempt = Extraction(node, steps)
            if exact(attempt) or not exact(best):
                best = attempt
                break
    return best

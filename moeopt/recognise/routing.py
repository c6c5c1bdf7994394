"""The routing: the tensors in the model that say which experts each token has, and with what weight.

The probe call yields triples (token, expert, weight). Any tensor computed before the experts whose
entries equal them is the router's answer; everything after it is dispatch and is dropped, everything
before it is the router and is kept. In order of preference:

    ids (T, K) integers           a permutation-free list of experts per token
    weights (T, K)                the weight of each id, bit for bit
    scores (T, E)                 a table that holds the weights at the chosen places (gathered by id)
    dense (T, E) or (T, E, C)     zero where an expert is not chosen (summed over capacity slots C)
    mask (T, K, E)                one-hot choices; an all-zero row is a dropped token. In a mask that is an
                                  argument any number of experts may be named: each entry gets a slot of its own
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.ids_of_masks import table_to_ids
from moeopt.recognise.renumbered import renumbered
from moeopt.recognise.router_steers import CHOICES
from moeopt.recognise.routing_by_ids import by_ids, id_recipes, ids_of_sequences, unserved_ids
from moeopt.recognise.routing_by_sum import SumOfCodes
from moeopt.recognise.routing_by_tables import by_choice, by_dense, by_flags, by_mask
from moeopt.recognise.routing_candidates import axis_orders, rebuilt
from moeopt.recognise.routing_of_sequences import repeated_here
from moeopt.recognise.routing_types import (
    Extraction,
    FixedShares,
    Key,
    NoIds,
    NoWeights,
    Routing,
    Search,
    Table,
    fits_table,
)
from moeopt.value_types import PyObject

aten = torch.ops.aten


def find_routing(
    tape: Tape,
    before: list[fx.Node],
    table: Table,
    dtype: torch.dtype | None,
    prior: tuple[Routing, list[int]] | None = None,
    accept: Callable[[Routing], None] = lambda routing: None,
    rarer: Sequence[Search] = (),
    last: Search | None = None,
) -> Routing:
    """Find ids and weights among ``before``, nodes that depend on no expert.

    Args:
        dtype: of the weights where they multiply, to prefer among equal tensors.
        prior: what another probe call showed, and the candidate of each id on this one; the same tensors are
            taken where they still hold.
        accept: raises ``Declined`` for a reading that cannot be the router's answer; the next is tried.
        rarer: searches that are made where the usual ones find nothing.
        last: one that is made where nothing names the experts, and nothing says why.

    Raises:
        Declined: no tensor holds the choice or the weights.
    """
    refused: Declined | None = None
    again = _again(tape, before, table, *prior) if prior is not None else None
    searches = itertools.chain.from_iterable(
        _search(tape, before, numbered, dtype, factor, searches)
        for numbered in itertools.chain([table], renumbered(tape, before, table))
        for searches in (_USUAL, rarer)
        for factor in (1.0, *table.factors)
    )
    for found in itertools.chain([again] if again is not None else [], searches):
        try:
            accept(found)
        except Declined as err:
            refused = refused or err.with_traceback(None)
            continue
        extractions = [r for r in (found.ids, found.weights) if r is not None]
        found.keys = tuple(_key(before, node) for r in extractions for node in r.places)
        return found
    if refused is not None:
        try:
            raise refused
        finally:
            del refused
    why = _why_none(tape, before, table)
    if last is None or not isinstance(why, NoIds):
        raise why
    for found in last(tape, before, table, dtype):
        accept(found)
        return found
    raise why


def _why_none(tape: Tape, before: list[fx.Node], table: Table) -> Declined:
    """The reason why no reading of ``before`` is the routing, for the user."""
    if (chosen := _left_out(tape, before, table)) is not None:
        return Declined(
            "its experts leave out tokens that the router gave them (a capacity that keeps the first or the best so "
            "many), so that a token's result depends on the other tokens; set the weights of such tokens to 0 in the "
            "tensor of all tokens' weights, or raise the capacity until no token is left out",
            chosen.meta.get("source", ""),
        )
    ids = next(id_recipes(tape, before, table), None)
    if ids is None:
        why = ids_of_sequences(tape, before, table) or unserved_ids(tape, before, table)
        return why or _given_places(tape, before, table) or _why_no_ids(table)
    return NoWeights(
        "the expert ids were found, but no tensor holds the routing weights that the experts are multiplied by "
        "(a later expert may replace the result of an earlier one); compute the weights of all tokens in one tensor "
        "before the loop, and add up the results",
        "" if ids[0].source is None else ids[0].source.meta.get("source", ""),
    )


def _given_places(tape: Tape, before: list[fx.Node], table: Table) -> Declined | None:
    """The reason where the caller gives the numbers of each expert's rows, an argument for each expert."""
    given = [
        n for n in before if n.op == "placeholder" and n.meta["dtype"] == torch.int64 and len(n.meta["shape"]) == 1
    ]
    places = {tuple(sorted(tape.value(n).tolist())) for n in given}
    rows = [tuple(seen.nonzero().flatten().tolist()) for seen in table.visits.t()]
    if not given or not all(one in places for one in rows if one):
        return None
    return Declined(
        "the caller gives the places of each expert's rows (an argument of indices for each expert), and the op takes "
        "the expert of each token: a probe cannot make up places that fit another number of rows; pass one tensor of "
        "ids or a mask for each token, and pick the rows by it (y[ids == e] = expert(x[ids == e]))"
    )


def _why_no_ids(table: Table) -> Declined:
    """The reason why no tensor before the experts names them, by how many tokens each expert saw."""
    seen, taken = table.visits.sum(1), table.visits.sum(0)  # by each token, and by each expert
    if bool((taken == taken[0]).all()) and bool((seen != seen[0]).any()):
        return Declined(
            "each of its experts takes the same number of tokens while tokens get different numbers of experts: "
            "that is expert choice routing, where a token's experts depend on the other tokens; the op routes each "
            "token by itself"
        )
    order = table.visits[:, table.natural].argmax(1)
    turns = int((order.diff() < 0).sum()) + 1  # the code runs the experts once for each sequence of the batch
    in_blocks = len(order) % turns == 0 and bool((order.view(turns, -1) == order.view(turns, -1)[0]).all())
    if in_blocks and bool((seen == 1).all()) and not bool((taken == taken[0]).all()):
        return Declined(
            "its experts serve fixed places of a sequence (a slice each, as of image and text tokens), so no tensor "
            "before them holds the expert id of each token; choose by such a tensor: ids = (torch.arange(length) >= "
            "first).long().expand(batch, length), and y[ids == e] = expert(x[ids == e])"
        )
    if in_blocks and bool((seen == 1).all()):
        return FixedShares(
            "every expert reads its own fixed share of the rows (slots that mix tokens, as in soft MoE, or a "
            "slice of the batch), so no tensor before the experts holds the expert ids of each token: the op "
            "dispatches whole tokens by id"
        )
    plain = not table.weighed and bool((table.weights == table.weights[0]).all())
    if plain and bool((table.visits == 1).all()) and len(taken) > 1:
        return NoIds(
            f"every token passes all of its {len(taken)} experts, and no router weighs them (a plain sum, or "
            "weights that are the same for every token): the op would leave no product out, so this block stays as it "
            "is"
        )
    return NoIds(
        "no tensor before the experts holds the expert ids of each token (as integers, a one-hot mask or a "
        "dense table of weights); return the router's top-k as tensors that the dispatch reads"
    )


def _left_out(tape: Tape, before: list[fx.Node], table: Table) -> fx.Node | None:
    """The tensor of a choice that names every visit, and pairs of token and expert that were none.

    Experts that leave tokens out then all serve the same number of tokens, their capacity, and no expert serves more.
    """
    tokens, candidates = table.visits.shape
    seen = (table.visits > 0)[:, torch.tensor(table.natural)]
    for node in before:
        source = node.args[0] if node.target is operator.getitem else node
        chosen = isinstance(source, fx.Node) and op_name(source) in CHOICES
        size = math.prod(node.meta.get("shape") or ())
        if not chosen or node.meta["dtype"] != torch.int64 or not size or size % tokens or size >= tokens * candidates:
            continue
        for steps in axis_orders(node.meta["shape"], tokens, size // tokens):
            ids = Extraction(node, steps).run(tape)
            if int(ids.max()) < candidates:
                named = torch.zeros(tokens, candidates, dtype=torch.bool).scatter_(1, ids, True)
                cut = (named & ~seen).any(0)
                if bool((named | ~seen).all()) and bool(cut.any()):
                    served = seen.sum(0)
                    if 0 < int(served[cut].min()) == int(served.max()):
                        return node
    return None


def _search(
    tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None, factor: float,
    searches: Sequence[Search],
) -> Iterator[Routing]:  # fmt: skip
    """Every reading of ``before`` by which ``factor`` times the weights found are those of ``table``."""
    if factor != 1.0:
        table = dataclasses.replace(table, weights=(table.weights.double() / factor).to(table.weights.dtype))
    for search in searches:
        for found in search(tape, before, table, dtype):
            if factor != 1.0:
                steps = [*found.weights.steps, (aten.mul.Scalar, (factor,))]
                found.weights = dataclasses.replace(found.weights, steps=steps)
            yield found


def _fingerprints(before: list[fx.Node]) -> dict[fx.Node, int]:
    """A hash of how each node is computed, sizes left out: equal for the same line of two probe calls."""
    prints: dict[fx.Node, int] = {}

    def word(a: PyObject) -> PyObject:
        if isinstance(a, fx.Node):
            return prints.get(a, hash(a.op))
        if isinstance(a, (list, tuple)):
            return tuple(word(x) for x in a)
        return None if isinstance(a, int) and not isinstance(a, bool) else repr(a)

    for node in before:
        name = str(node.target) if node.op != "get_attr" or "constant" not in node.meta else "constant"
        prints[node] = hash((node.op, name, tuple(word(a) for a in node.args)))
    return prints


def _key(before: list[fx.Node], node: fx.Node | None) -> Key:
    if node is None:
        return None
    prints = _fingerprints(before)
    alike = [n for n in before if prints[n] == prints[node]]
    return prints[node], alike.index(node)


def _again(tape: Tape, before: list[fx.Node], table: Table, prior: Routing, mapping: list[int]) -> Routing | None:
    """``prior``'s extractions on the same lines of this tape, if they give what this probe call showed."""
    if isinstance(prior.weights, SumOfCodes):  # the sum of another call is read anew
        return None
    prints = _fingerprints(before)
    by_print: dict[int, list[fx.Node]] = {}
    for node in before:
        by_print.setdefault(prints[node], []).append(node)

    keys = iter(prior.keys)

    def here(extraction: Extraction) -> Extraction | None:
        nodes = []
        for _ in extraction.places:
            key = next(keys)
            if key is None:
                return Extraction(None, extraction.steps)
            alike = by_print.get(key[0], [])
            if key[1] >= len(alike):
                return None
            nodes.append(alike[key[1]])
        found = Extraction(nodes[0], extraction.steps, tuple(nodes[1:]))
        return repeated_here(tape, found, len(table.visits)) if prior.of_groups else found

    ids_extraction = here(prior.ids) if prior.ids is not None else None
    if prior.ids is not None and ids_extraction is None:
        return None
    weights_extraction = here(prior.weights)
    if weights_extraction is None:
        return None
    try:
        ids = (
            ids_extraction.run(tape).long()
            if ids_extraction is not None
            else table_to_ids(weights_extraction.run(tape))
        )
        weights = weights_extraction.run(tape, ids)
        same_form = weights.shape == ids.shape and ids.shape[0] == table.visits.shape[0]
        fits = same_form and fits_table(rebuilt(ids, weights, mapping, table.visits.shape[1]), table)
    except (RuntimeError, IndexError):  # on this tape the same lines hold values of another form
        return None
    if not fits:
        return None
    return Routing(prior.top_k, ids_extraction, weights_extraction, mapping, prior.form, of_groups=prior.of_groups)


_USUAL: tuple[Search, ...] = (by_ids, by_mask, by_dense, by_choice, by_flags)

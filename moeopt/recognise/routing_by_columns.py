"""A router whose weights, or flags, are one vector an expert: no tensor holds the table, its columns stand apart.

    for g, (router, experts) in enumerate(groups):          p_TG = softmax(top(x))
        for m, expert in enumerate(experts):                q_TM = softmax(router(x))
            y = y + p_TG[:, g, None] * q_TM[:, m, None] * expert(x)

A gate for each expert (``sigmoid(gate_e(x)) * expert_e(x)``) is the same. Each vector has an entry for every token, and
they stand side by side in the rewritten block. So do flags, as of intervals of a number that each token has:

    for e, (first, end) in enumerate(intervals):            y[mine] = expert_e(x[mine])
        mine = (t >= first) & (t < end)

Legend: T tokens, C candidates (experts), G groups of M experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.recognise.ids_of_masks import table_to_ids
from moeopt.recognise.routing_by_tables import one_for_each_token
from moeopt.recognise.routing_candidates import possible_sources
from moeopt.recognise.routing_types import Extraction, Routing, RoutingForm, Table, same_values

aten = torch.ops.aten
_PICK = ("index", "index_put", "index_put_", "nonzero", "masked_select")
"""What takes the rows of a flag."""


def by_columns(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
    """The reading by which each expert's weights are a vector; for :func:`~moeopt.recognise.routing.find_routing`.

    Where some tokens do not go to some expert, their choice stands in ids or in a table, which are searched before.
    Weights that are the same for all tokens of the probe are left to others: their vector cannot be told by values.
    """
    tokens, candidates = table.weights.shape
    want_TC = table.weights[:, torch.tensor(table.natural)]
    if tokens < 2 or not bool(table.chosen.all()) or bool((want_TC == want_TC[:1]).all(0).any()):
        return
    vectors = [n for n in possible_sources(before, floating=True) if math.prod(n.meta["shape"]) == tokens]
    if len(vectors) < candidates:
        return
    values = [(n, tape.value(n).reshape(-1)) for n in reversed(vectors)]
    for wanted in dict.fromkeys([dtype, *(n.meta["dtype"] for n, _ in values)]):
        of_dtype = [(n, v) for n, v in values if n.meta["dtype"] == wanted]
        nodes = [next((n for n, v in of_dtype if same_values(v, column)), None) for column in want_TC.unbind(1)]
        found = [n for n in nodes if n is not None]
        if len(found) == len(nodes):
            weights = Extraction(found[0], [], tuple(found[1:]))
            yield Routing(candidates, None, weights, table.natural, RoutingForm.DENSE)


def by_flags_apart(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
    """The readings by which each expert's tokens are a vector of flags: the flags are the weights, or one number for
    each token weighs what its experts give.

    Flags that are the same for all tokens of the probe are left to others: their vector cannot be told by values.
    """
    tokens, candidates = table.weights.shape
    natural = torch.tensor(table.natural)
    want_TC, chosen_TC = table.weights[:, natural], table.visits[:, natural] > 0
    if tokens < 2 or bool((chosen_TC == chosen_TC[:1]).all(0).any()):
        return
    flags = [n for n in before if n.meta.get("dtype") == torch.bool and math.prod(n.meta["shape"]) == tokens]
    if len(flags) < candidates:
        return
    picking = [n for n in flags if any(op_name(u) in _PICK for u in n.users)]  # others may be equal by chance
    values = [(n, tape.value(n).reshape(-1)) for n in reversed(picking or flags)]
    nodes = [next((n for n, v in values if torch.equal(v, column)), None) for column in chosen_TC.unbind(1)]
    found = [n for n in nodes if n is not None]
    if len(found) < len(nodes):
        return
    first, *others = found
    if not table.weighed and torch.equal(want_TC, chosen_TC.to(want_TC.dtype)):
        weights = Extraction(first, [(aten.to.dtype, (table.weights.dtype,))], tuple(others))
        yield Routing(candidates, None, weights, table.natural, RoutingForm.TABLE)
        return
    ids = Extraction(first, [(table_to_ids, ())], tuple(others))
    for node in reversed(list(possible_sources(before, floating=True))):
        if math.prod(node.meta["shape"]) == tokens:
            each = one_for_each_token(tape, node, chosen_TC, want_TC.double())
            if each is not None:
                yield Routing(candidates, ids, each, table.natural, RoutingForm.TABLE)
                return

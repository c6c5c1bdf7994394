"""The routing of recognised experts: what decides it, what it multiplies, and what else depends on it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.obstacles import Rank
from moeopt.recognise.asked_weights import left_out
from moeopt.recognise.combine import Combine, Labels
from moeopt.recognise.expert_refs import accumulation, natural_order, same_layout, with_layouts
from moeopt.recognise.expert_rows import sites_in
from moeopt.recognise.experts_hit import ExpertsNotHit, universe_of
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import source_of
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.ids_of_masks import one_beyond
from moeopt.recognise.limits import check_limits
from moeopt.recognise.product_of_all import layers_of_all_before
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router_steers import only_the_router_steers
from moeopt.recognise.routing import find_routing
from moeopt.recognise.routing_by_columns import by_columns, by_flags_apart
from moeopt.recognise.routing_by_ids import by_names
from moeopt.recognise.routing_by_kept import by_kept
from moeopt.recognise.routing_by_sum import by_sum
from moeopt.recognise.routing_of_sequences import by_sequences
from moeopt.recognise.routing_types import FixedShares, NoIds, NoWeights, Routing, Table
from moeopt.recognise.routing_weights import (
    factors,
    hidden_weights,
    input_weights,
    is_identity,
    numbers_of_experts,
    passes_through,
    weighed,
    weight_dtype,
)
from moeopt.recognise.rows_carried import check_rows_carried
from moeopt.recognise.slot_vectors import by_slots
from moeopt.recognise.sum_base import checked_base, tensor_of_base
from moeopt.recognise.token_rows import Tokens
from moeopt.recognise.weight_position import WeightPosition, weight_position
from moeopt.value_types import PyObject


def with_frontier(
    tape: Tape, group: list[FFNCandidate], tokens: Tokens, labels: Labels, experts: list[Any],
    spec: PyObject, combine: Combine,
    functions: dict[object, tuple[ExpertsSpec, bool]], known: list[Recognition] | None, missing: int,
    progress: list[int], levels: bool = False,
) -> Recognition:  # fmt: skip
    ins = sites_in(group)
    inside = _inside(tape, ins, combine)
    until = tape.nodes[: combine.node.meta["index"]]
    before = [n for n in until if n not in inside and n.meta.get("shape") is not None]
    if len(experts) == 1:
        raise Declined(
            "only one of its experts could be read; all of a block's experts or none are rewritten",
            source_of(group[0]),
            rank=Rank.READING,
        )
    flow = _flow(tape, combine, ins, inside)
    held = tensor_of_base(tape, combine, before)
    table = _table(tape, group, tokens, labels, experts, combine, bool(known), _is_linear(spec, experts), held)
    tables = _routing_tables(tape, flow, table)
    prior = next((k for k in known or [] if list(dict.fromkeys(k.experts)) == experts), None)
    again = None if prior is None else (prior.routing, [experts.index(e) for e in prior.experts])
    dispatch = [n for n in until if n in flow and n.meta.get("shape") is not None]
    place: WeightPosition = "output"

    def accept(reading: Routing) -> None:
        nonlocal place
        only_the_router_steers(tape, reading, tables, set(dispatch), tokens.node)
        reading.leave_out = left_out(reading, flow, tape)
        if not labels.hidden:
            place = weight_position(tape, reading, table, tokens, labels, combine, group)

    try:
        of_sequences = by_sequences(tokens.node.meta["shape"], tokens.axis)
        rarer = (by_slots, by_kept, by_names, of_sequences, by_columns, by_flags_apart)
        last = by_sum(labels, combine, tokens, group, levels)
        routing = find_routing(tape, dispatch, table, weight_dtype(tape, group), again, accept, rarer, last)
    except (FixedShares, NoIds, NoWeights) as err:
        _say_more(err, group, tokens, labels, combine)
        raise _told_by_flow(tape, err, tokens, labels, combine, len(experts)) from None
    progress[0] = 4
    ids = routing.ids.run(tape) if routing.ids is not None else None
    if missing:
        _check_named(ids, len(experts), missing, group)
    identity = _adds_own_row(tape, tokens, combine, routing, ids, len(experts), prior)
    if ids is None or identity:
        routing.leave_out = None
    base = None if identity else checked_base(tape, tokens, combine, held, experts, ids)
    _check_what_is_left_out(tape, group, tokens, labels, combine, routing, base, not isinstance(spec, ExpertsSpec))
    ordered = [experts[c] for c in routing.experts]
    if isinstance(spec, ExpertsSpec):
        same_layout(ordered, group)
        spec = with_layouts(tape, spec, ordered[0])
    spec = dataclasses.replace(
        spec, weight_on=place, out_of_range="identity" if identity else "nothing", **accumulation(combine)
    )
    line = min(filter(None, map(source_of, group)), default="")
    return Recognition(tokens, routing, combine, base, ordered, spec, inside, line, functions)


def _told_by_flow(
    tape: Tape, err: Declined, tokens: Tokens, labels: Labels, combine: Combine, experts: int
) -> Declined:
    """The cause behind a refusal, where what stands before or behind the experts shows one; else the refusal."""
    told = None
    if isinstance(err, FixedShares):
        told = layers_of_all_before(tape, tokens.node, experts)
    elif isinstance(err, NoWeights):
        told = numbers_of_experts(tape, combine, list(labels.token))
    return told or err


def _say_more(err: Declined, group: list[FFNCandidate], tokens: Tokens, labels: Labels, combine: Combine) -> None:
    """Add to a refusal what this reading shows of it."""
    if isinstance(err, NoIds):
        err.routed = _not_for_all(group, labels, combine.weights)
    elif isinstance(err, FixedShares) and tokens.node.op == "placeholder":
        # the block gets slots as an argument, and the code that fills them may dispatch by ids
        err.rank = Rank.READING


def _not_for_all(group: list[FFNCandidate], labels: Labels, weights_TC: torch.Tensor) -> tuple[list[FFNCandidate], ...]:
    """The candidates of ``group`` whose weight is not the same for all tokens, and those whose weight is 0 for some.

    The others, in no router's table, serve all: by their plain sum, or by a gate of their own. Where whole sequences
    are routed, an expert that every one of a few chose has no 0 either. One without rows serves none on this call.
    """
    numbers = {c: torch.cat([labels.candidate[out] for out in c.outs]) for c in group}
    for_all = (weights_TC == weights_TC[:1]).all(0) & weights_TC.bool().all(0), (weights_TC != 0).all(0)
    return tuple([c for c in group if not len(numbers[c]) or not bool(one[numbers[c]].all())] for one in for_all)


def _check_named(ids: torch.Tensor | None, count: int, missing: int, group: list[FFNCandidate]) -> None:
    """``ExpertsNotHit`` unless the ids name each of the ``missing`` experts that follow ``count`` known ones."""
    if ids is None or not set(range(count, count + missing)) <= set(ids.unique().tolist()):
        raise ExpertsNotHit(
            "some of the weights that look like experts were never reached by a probe", source_of(group[0])
        )


def _check_what_is_left_out(
    tape: Tape, group: list[FFNCandidate], tokens: Tokens, labels: Labels, combine: Combine, routing: Routing,
    base: fx.Node | None, functions: bool,
) -> None:  # fmt: skip
    """``Declined`` where what the rewrite leaves out holds a limit, or does more to rows than carry them.

    Experts that are functions hold the calls that their matrices are computed with, a clamp of codes among them.
    """
    sources = [tokens.node, *tokens.beside, base, *routing.nodes]
    fitted = {n for c in group for n in c.mid}
    if functions:
        fitted |= ancestors(fitted) - set(descendants(tape, [n for n in tape.nodes if n.op == "placeholder"]))
    kept = [n for n in sources if n is not None]
    check_limits(tape, combine.node, kept, fitted, source_of(group[0]))
    operands = [s.operand for s in sites_in(group)]
    outs = [s.node for s in labels.token]
    check_rows_carried(tape, tokens.node, operands, outs, combine.node, kept, source_of(group[0]))


def _table(
    tape: Tape, group: list[FFNCandidate], tokens: Tokens, labels: Labels, experts: list[Any], combine: Combine,
    known: bool, linear: bool, held: fx.Node | None,
) -> Table:  # fmt: skip
    """What this probe call showed of the routing: which expert saw which token, and with what weight."""
    weights = combine.weights
    if tokens.weighted:
        weights = input_weights(group, tokens, labels, combine, linear)
    elif labels.hidden:
        weights = hidden_weights(labels, combine)
    natural = list(range(len(experts))) if known else natural_order(tape, experts)
    sites = list(labels.token)
    return Table(weights, labels.visits(), natural, universe_of(tape, experts), weighed(tape, combine, sites),
                 factors(tape, combine, sites), combine.base is None or held is not None)  # fmt: skip


def _is_linear(spec: PyObject, experts: list[Any]) -> bool:
    """Whether the experts are products of matrices alone, as low-rank adapters are."""
    if not isinstance(spec, ExpertsSpec) or spec.activation != "identity" or spec.gated:
        return False
    more = (spec.gate_min, spec.gate_max, spec.act_min, spec.act_max, spec.out_norm_eps)
    return all(one is None for one in (*more, *(b for e in experts for b in (*e.b_in, e.b_out))))


def _adds_own_row(
    tape: Tape, tokens: Tokens, combine: Combine, routing: Routing, ids: torch.Tensor | None, count: int,
    prior: Recognition | None,
) -> bool:  # fmt: skip
    """Whether an id of ``count`` or more adds the token's own row; a row passed through as it is gets the weight 1."""
    if passes_through(tape, combine, tokens, routing, ids, count):
        routing.weights.steps = [*routing.weights.steps, (one_beyond, ("@ids", count))]
    identity = is_identity(tape, combine, tokens, routing, ids, count)
    if prior is not None and (ids is None or not bool((ids >= count).any())):
        return bool(
            prior.spec.out_of_range == "identity"
        )  # this probe call has no such id, so that it does not contradict the reading
    return identity


def _inside(tape: Tape, ins: list[GemmSite], combine: Combine) -> set[fx.Node]:
    """What depends on single experts, but not on their sum alone: that is what the rewrite leaves out."""
    inside = {s.matmul for s in ins}
    passed_on = set(inside)
    for node in tape.nodes[min(n.meta["index"] for n in inside) :]:
        if any(a in passed_on for a in node.all_input_nodes):
            inside.add(node)
            if node is not combine.node:
                passed_on.add(node)
    return inside


def _routing_tables(tape: Tape, flow: set[fx.Node], table: Table) -> set[fx.Node]:
    """Dense (T, E) forms of the routing among the nodes that dispatch reads."""
    want = table.weights[:, torch.tensor(table.natural)].double()
    found = set()
    for node in flow:
        shape = node.meta.get("shape") or ()
        if math.prod(shape) == want.numel() and shape[-1:] == want.shape[-1:] and node.op == "call_function":
            value = tape.value(node).reshape(want.shape).double()
            if torch.equal(value, want) or torch.equal(value, (want != 0).double()):
                found.add(node)
        elif math.prod(shape) > want.numel() and shape[-1:] > want.shape[-1:] and node.op == "call_function":
            found.update(_columns_of_experts(tape, node, want))
    return found


def _columns_of_experts(tape: Tape, wider: fx.Node, want_TE: torch.Tensor) -> list[fx.Node]:
    """What picks columns of experts out of a table with further columns (of null experts, or of shared ones); none
    where ``wider`` is no such table."""
    tokens, experts = want_TE.shape
    if math.prod(wider.meta["shape"]) != tokens * wider.meta["shape"][-1]:
        return []
    value = tape.value(wider).reshape(tokens, -1)[:, :experts].double()
    if not torch.equal(value, want_TE) and not torch.equal(value, (want_TE != 0).double()):
        return []
    last = (-1, len(wider.meta["shape"]) - 1)
    found = []
    for user in wider.users:
        name, places = op_name(user), list[Any](user.args)
        if name in ("select", "slice") and places[1] in last:
            until = places[2] + 1 if name == "select" else [*places, math.inf][3]
            if 0 < until <= experts:
                found.append(user)
    return found


def _flow(tape: Tape, combine: Combine, ins: list[GemmSite], inside: set[fx.Node]) -> set[fx.Node]:
    """What dispatch and combine read: ancestors of the sum and of the experts' inputs, and what left the tape."""
    stack = [combine.node, *(s.operand for s in ins), *(r.node for r in tape.reads)]
    seen: set[fx.Node] = set()
    matmuls = {s.matmul for s in ins}
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node not in matmuls:
                stack.extend(node.all_input_nodes)
    return seen - inside

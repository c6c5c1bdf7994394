"""Whether the routing weights multiply the experts' inputs or their outputs, also where no value seen can tell.

Renormalised over one expert, a weight ``s / (s + 1e-9)`` is exactly 1 on every likely row: the experts' inputs are
exact copies of tokens and their outputs are added as they are, wherever the weight stands; scaled, it is exactly 0.5,
and so is its copy in the experts' order. A tensor that is constant
on the probes says nothing by its values. So its place is read off the dataflow, and what the rewrite makes of it is
checked by running the tape again with other values in it; no other float may enter where all factors seen are equal.

Legend: T tokens, C candidates (experts), K chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory
from moeopt.capture.replay import descendants, replay
from moeopt.capture.same_graph import same_call
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.combine import Combine, Labels, entry_weights
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.ids_of_masks import table_to_ids
from moeopt.recognise.routing_candidates import rebuilt
from moeopt.recognise.routing_types import Routing, Table, same_values
from moeopt.recognise.token_rows import Tokens, rows_as_bytes, rows_of

WeightPosition = Literal["input", "output"]
_CONSTANT = "is the same for every probe, so its values do not show what it does"


def weight_position(
    tape: Tape,
    reading: Routing,
    table: Table,
    tokens: Tokens,
    labels: Labels,
    combine: Combine,
    candidates: list[FFNCandidate],
) -> WeightPosition:
    """Where the weights of ``reading`` multiply.

    Raises:
        Declined: a float that ``reading`` leaves out enters beside the experts, or the weights, changed in a replay,
            do not enter as the rewrite would have them.
    """
    ins, source = list(dict.fromkeys(s for c in candidates for s in c.ins)), reading.weights.source
    seen = combine.weights[labels.visits() > 0]
    masked = not tokens.weighted and bool((seen == 0).any())  # every expert runs on every token; zeros keep the choice
    constant = _constant(seen[seen != 0] if masked else seen)
    if masked and not (constant and source is not None and _constant(tape.value(source).reshape(-1))):
        return "output"
    settled: WeightPosition | None = "input" if tokens.weighted else None if constant else "output"
    stop = source if settled is None else None
    copies = _copies_of(tape, tokens)
    into, other = (False, None) if tokens.weighted else _entering([s.operand for s in ins], stop, copies)
    if other is not None:
        raise Declined(
            f"a factor on its experts' input rows {_CONSTANT}; multiply the rows before the router reads them, "
            "or multiply the experts' outputs",
            other.meta.get("source"),
        )
    if settled == "output" or source is None:
        return settled or "output"
    onto, other = _entering([combine.node], stop, _summand(tape, labels, combine)) if constant else (False, None)
    if other is not None:
        raise Declined(
            f"a factor on its experts' outputs, beside the routing weights, {_CONSTANT}; multiply it into the "
            "routing weights before the experts run",
            other.meta.get("source"),
        )
    if settled is not None:
        if _constant(tape.value(source).reshape(-1)):  # any tensor of that number, in any order, would be as good
            _check_with_others(tape, reading, table, tokens, labels, combine, candidates, settled)
        return settled
    if into == onto:
        return _of_both_or_none(source, into)
    place: WeightPosition = "input" if into else "output"
    _check_with_others(tape, reading, table, tokens, labels, combine, candidates, place)
    return place


def _of_both_or_none(source: fx.Node, both: bool) -> WeightPosition:
    """Where weights count that were found to enter in both places or in none."""
    if source.meta.get("dtype") == torch.bool:
        return "output"  # flags pick the rows, and a row that is picked counts once, wherever a 1 is multiplied
    where = "act on both the experts' inputs and their outputs" if both else "never reach the experts"
    raise Declined(f"the tensor that holds the routing weights of all probes would {where}")


def _constant(values: torch.Tensor) -> bool:
    return bool((values == values[:1]).all())


def _entering(
    starts: Iterable[fx.Node], stop: fx.Node | None, passed: Callable[[fx.Node], bool | None]
) -> tuple[bool, fx.Node | None]:
    """(``stop`` is met, a float beside it that is computed from the block's input) on the way back from ``starts``.

    Args:
        passed: None for a node at which a way ends, True for one that is only on the way, False for one that counts.
    """
    met, seen = False, set()
    stack: list[tuple[fx.Node, fx.Node | None]] = [(n, None) for n in starts]
    while stack:
        node, beside = stack.pop()
        met = met or node is stop
        dtype = node.meta.get("dtype")
        if node is stop or is_factory(node) or (dtype is not None and not dtype.is_floating_point):
            continue
        if (node, beside is None) in seen:
            continue
        seen.add((node, beside is None))
        if beside is None:
            kind = passed(node)
            if kind is None:
                continue
            beside = None if kind else node
        if node.op == "placeholder" and beside is not None:
            return met, beside
        stack.extend((a, beside) for a in node.all_input_nodes)
    return met, None


def _copies_of(tape: Tape, tokens: Tokens) -> Callable[[fx.Node], bool | None]:
    """Nodes whose rows are tokens or zero, or hold all tokens, are on the way of the rows; it ends at the tokens."""
    tokens_TH = rows_of(tape.value(tokens.node), tokens.axis)
    known: dict[torch.dtype, set[bytes]] = {}

    def passed(node: fx.Node) -> bool | None:
        if same_call(node, tokens.node):
            return None
        value, dtype = tape.value(node), node.meta.get("dtype")
        if dtype is None:  # an op with several results: each result is looked at
            return True
        held = known.setdefault(dtype, set(rows_as_bytes(tokens_TH.to(dtype))))
        width = tokens_TH.shape[-1]
        readings = [rows_of(value, d) for d, size in enumerate(value.shape) if size == width]
        if value.shape[-1:] != (width,) and value.dim() and value.shape[-1] % width == 0:
            readings.append(value.reshape(-1, width))  # rows that masked_select made one vector of, or whole sequences
        seen = (set(rows_as_bytes(v[v.bool().any(-1)])) for v in readings)
        return any(rows <= held or held <= rows for rows in seen)

    return passed


def _summand(tape: Tape, labels: Labels, combine: Combine) -> Callable[[fx.Node], bool | None]:
    """A way back from the sum ends at an expert's output, and at a tensor that the sum is added onto."""
    outs = {s.node for s in labels.token}
    below = {combine.node, *outs, *descendants(tape, outs)}

    def passed(node: fx.Node) -> bool | None:
        onto = combine.base is not None and node not in below and node.meta.get("shape") == combine.node.meta["shape"]
        return None if node in outs or onto else node in below

    return passed


def _check_with_others(
    tape: Tape, reading: Routing, table: Table, tokens: Tokens, labels: Labels, combine: Combine,
    candidates: list[FFNCandidate], place: WeightPosition,
) -> None:  # fmt: skip
    """Run the tape again with other weights: they must enter at ``place``, and there alone, as they are.

    Raises:
        Declined: the weights enter in another way (as their square, say, which is 1 where the weight is 1).
    """
    source = reading.weights.source
    assert source is not None
    value = tape.value(source)
    # of the rows as they were seen
    seen_with = float(value.reshape(-1)[0]) if place == "input" and tokens.weighted else 1.0
    factor = 0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = (value.double() * factor.to(value.device)).to(value.dtype)
    later = descendants(tape, [source], combine.node.meta["index"])
    outs = set(labels.token)
    below = set(descendants(tape, [s.node for s in outs])) | {s.node for s in outs}
    held = {n: tape.value(n) for n in later if not getattr(n.meta.get("dtype"), "is_floating_point", True)}
    ids = reading.ids.run(tape) if reading.ids is not None else None
    weights = reading.weights.on(changed, ids)
    want = rebuilt(table_to_ids(weights) if ids is None else ids, weights, reading.experts, table.visits.shape[1])
    try:
        values = replay(tape, [n for n in later if n not in below], {source: changed, **held})
        entered = entry_weights(tape, labels, combine.node, combine.axis, values)[1]
    except (RuntimeError, IndexError) as err:
        raise Declined(
            f"its forward does not run with other routing weights ({err}), so their place is unknown"
        ) from err
    seen = labels.visits() > 0
    expected = want.to(entered.dtype) if place == "output" else combine.weights
    if not same_values(entered[seen], expected[seen]) or not all(
        _rows_follow(
            tape,
            candidate,
            site,
            tokens,
            labels,
            values,
            want / seen_with if place == "input" else torch.ones_like(want),
            combine.weights != 0,
        )
        for candidate in candidates
        for site in candidate.ins
    ):
        raise Declined(
            f"the tensor that holds the routing weights {_CONSTANT}, and with other values it does not multiply the "
            f"experts' {place}s as it is",
            source.meta.get("source"),
        )


def _rows_follow(
    tape: Tape, candidate: FFNCandidate, site: GemmSite, tokens: Tokens, labels: Labels,
    values: dict[fx.Node, torch.Tensor], factors: torch.Tensor, counts: torch.Tensor,
) -> bool:  # fmt: skip
    """True where those input rows of ``site`` that count, (T, C) bool, changed by ``factors`` (T, C)."""
    before = site.rows_in(tape.value(site.operand))
    after = site.rows_in(values[site.operand] if site.operand in values else tape.value(site.operand))
    token, out_token, which = tokens.token[site], labels.token[candidate.out], labels.candidate[candidate.out]
    if out_token.shape != token.shape or not torch.equal(out_token, token):
        return torch.equal(before, after) and bool((factors == 1).all())
    keep = token >= 0
    keep &= counts[token.clamp(min=0), which.clamp(min=0)]
    want = before[keep].double() * factors[token[keep], which[keep]][:, None]
    slack = 8 * torch.finfo(before.dtype).eps
    return bool(((after[keep].double() - want).abs() <= slack * want.abs()).all())

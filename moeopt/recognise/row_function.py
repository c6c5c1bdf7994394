"""Experts of any function of a row: found as values that are computed alike from different Parameters.

    x[t_e] --(calls over Parameters of e alone)--> out_e --weigh, combine--> y

``recognise.experts`` looks for two matmuls with something element-wise between; here nothing is known of the
function. Each value computed from the input is described twice: *how*, a hash of the calls that lead to it with
weights and sizes left out, and *of what*, the regions of Parameters that it depends on. Values that are computed alike
from Parameters that they do not share are what parallel experts hold; the last such values that depend on one rows
tensor alone are the experts' outputs (a routing weight is a second one). ``row_graph`` then writes the calls between as
one graph, and must find the same graph for each. Tokens, combine and routing are read as for all experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ir.weight_refs import MatrixRef, PartRef, SlotRefs, tensor_at
from moeopt.obstacles import Rank
from moeopt.recognise.combine import Labels, read_combine
from moeopt.recognise.experts_hit import ExpertsNotHit, siblings
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_of_experts import with_frontier
from moeopt.recognise.row_flow import Branch, Flow, branch_of, parallel_values, with_private_calls
from moeopt.recognise.row_graph import RowGraphReader
from moeopt.recognise.row_graph_channels import LAST, rows_last
from moeopt.recognise.row_graph_writer import NoRowFunction
from moeopt.recognise.rows_beside import check_beside, tokens_beside, with_distinct_rows_first
from moeopt.recognise.token_rows import Tokens, token_readings

MOST_TRIES = 24
"""Sets of parallel values that are tried in one block."""


def recognize_functions(tape: Tape, known: list[Recognition] | None = None, *, idle: bool = False) -> list[Recognition]:
    """Every group of experts in the block that are functions of a row, in execution order.

    Args:
        known: what an earlier probe call with every expert showed.
        idle: accept weights that no token reached, if ids did name them.

    Raises:
        Declined: there is none; the reason is that of the set that came furthest.
    """
    flow = Flow(tape)
    found: list[Recognition] = []
    refused: Declined | None = None  # by a call of whole experts: the largest and latest set
    nearest, far = Declined("no values on its tape are computed alike from Parameters of their own"), -1
    for tries, branches in enumerate(parallel_values(flow)):
        if tries == MOST_TRIES:
            break
        if any(b.end in r.interior for b in branches for r in found):
            continue
        for reading in _readings(flow, branches):
            progress = [0]
            try:
                found.append(_read(tape, flow, reading, known, idle, progress))
                break
            except ExpertsNotHit:
                raise
            except Declined as err:
                refused = err.with_traceback(None) if not tries and not progress[0] and err.where else refused
                if progress[0] > far:
                    nearest, far = err.with_traceback(None), progress[0]
    if not found:
        nearest.progress, nearest.refused = far, refused  # type: ignore[attr-defined]
        try:
            raise nearest
        finally:
            del nearest, refused
    return sorted(found, key=lambda r: r.combine.node.meta["index"])


def _readings(flow: Flow, branches: list[Branch]) -> Iterator[list[Branch]]:
    """The branches as they are; then from further back, where what leads to them serves single experts."""
    yield branches
    wider = [branch_of(*with_private_calls(flow, b.inside, dict.fromkeys((b.start, *b.same))), b.end) for b in branches]
    found = [b for b in wider if b is not None]
    if len(found) == len(branches) and any(a.start is not b.start for a, b in zip(found, branches, strict=True)):
        yield found


def _read(
    tape: Tape, flow: Flow, branches: list[Branch], known: list[Recognition] | None, idle: bool, progress: list[int]
) -> Recognition:
    branches = with_distinct_rows_first(tape, branches)
    graphs = _graphs(tape, branches)
    out_axis = next((g.out_axis for g in graphs if g is not None), LAST)
    group = [_chain(b, out_axis) for b in branches]
    source = group[0].out.node.meta.get("source")
    met = [g for g in graphs if g is not None]
    if not met:
        raise Declined("no token reached its experts")
    texts = {g.text for g in met}
    if len(texts) > 1:
        raise Declined("its experts do not all compute the same function", source)
    spec = RowFunction(texts.pop(), str(group[0].out.node.meta["dtype"]).removeprefix("torch."))
    progress[0] = 1
    experts = _experts(list(dict.fromkeys(tuple(g.slots) for g in met)), known, source)
    number = {ref.slots: e for e, ref in enumerate(experts)}
    missing = 0 if known is not None else _missing(tape, flow, experts)
    if missing and not idle:
        error = ExpertsNotHit(
            f"no probe token reached {missing} of its experts, so what they compute could not be checked; pass "
            "example inputs that reach every expert",
            source,
        )
        error.num_named = len(experts) + missing
        raise error
    sites = list(dict.fromkeys(s for c in group for s in c.ins))
    numbers = [-1 if g is None else number[tuple(g.slots)] for g in graphs]
    nearest = Declined("the experts' input rows are not rows of any one tensor")
    for tokens in token_readings(tape, sites):
        if branches[0].beside:
            progress[0] = 3  # whole experts, and the reading of a part of them would name another obstacle
            tokens = tokens_beside(tape, branches, group, tokens)
        labels = _labels(group, numbers, tokens, len(experts))
        here = [2]
        try:
            combine = read_combine(tape, labels)
            here[0] = 3
            found = with_frontier(tape, group, tokens, labels, experts, spec, combine, {}, known, missing, here)
            check_beside(tape, branches, found)
            return found
        except ExpertsNotHit:
            raise
        except Declined as err:
            if here[0] > progress[0]:
                nearest, progress[0] = err.with_traceback(None), here[0]
    try:
        raise nearest
    finally:
        del nearest


def _graphs(tape: Tape, branches: list[Branch]) -> list[RowGraphReader | None]:
    """The graph of each branch; None for one without rows: an expert that no token chose, called all the same.

    Where they differ, or one is refused, a fixed size may have been one expert's number of rows.
    """
    try:
        graphs = [_graph(tape, branch, rows_made=True) for branch in branches]
    except NoRowFunction as err:
        if not err.made_rows:
            raise
        graphs = []
    texts = {g.text for g in graphs if g is not None}
    if graphs and (len(texts) < 2 or not any(g is not None and g.made_rows for g in graphs)):
        return graphs
    return [_graph(tape, branch, rows_made=False) for branch in branches]


def _graph(tape: Tape, branch: Branch, rows_made: bool) -> RowGraphReader | None:
    if 0 in branch.end.meta["shape"] or 0 in branch.start.meta["shape"]:
        return None
    return RowGraphReader(
        tape, branch.start, branch.end, branch.inside, beside=branch.beside, axis=branch.axis, same=branch.same,
        rows_made=rows_made,
    )  # fmt: skip


def _experts(slots: list[tuple[PartRef, ...]], known: list[Recognition] | None, source: str | None) -> list[SlotRefs]:
    """The experts that ``slots`` belong to: those of the first probe where it was made, else one for each."""
    if known is None:
        own = next((p for p, refs in enumerate(zip(*slots, strict=True)) if len(set(refs)) > 1), 0)
        return [SlotRefs(s, own) for s in slots]
    every = [{r.slots: r for r in k.experts if isinstance(r, SlotRefs)} for k in known]
    keys: dict[Any, SlotRefs] | None = next((own for own in every if not own.keys().isdisjoint(slots)), None)
    if keys is None:
        raise Declined(
            "on a second call its experts read other weights than on the first, as one that is given a single row may "
            "be read otherwise; pass example inputs with several tokens for each expert",
            rank=Rank.READING,
        )
    if any(s not in keys for s in slots):
        raise ExpertsNotHit("a probe reached an expert that the first probe did not", source)
    return list(keys.values())


def _chain(branch: Branch, out_axis: int) -> FFNCandidate:
    """The branch as others read experts: where its rows come in and go out."""
    shape, out = branch.start.meta["shape"], branch.end.meta["shape"]
    at, into = branch.axis % len(shape), out_axis % len(out)
    region = MatrixRef("", (), (), (), shape[at], out[into])
    matrix = torch.zeros(math.prod(rows_last(shape, at)[:-1]), dtype=torch.long)

    def site(node: fx.Node) -> GemmSite:
        return GemmSite(node, node, branch.start, at, into, [region], matrix)

    inside = sorted(branch.inside, key=lambda n: n.meta["index"])
    return FFNCandidate([site(r) for r in branch.readers], [site(branch.end)], inside, ())


def _labels(group: list[FFNCandidate], numbers: list[int], tokens: Tokens, count: int) -> Labels:
    labels = Labels({}, {}, tokens.count, count)
    for candidate, expert in zip(group, numbers, strict=True):
        token = tokens.token[candidate.ins[0]]
        labels.token[candidate.out] = token
        labels.candidate[candidate.out] = torch.where(token >= 0, expert, -1)
    return labels


def _missing(tape: Tape, flow: Flow, experts: list[SlotRefs]) -> int:
    """How many experts there are by their Parameters' names, or places in one bank, that no token reached."""
    named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
    refs = [ref.w_out for ref in experts]
    used = {ref.path for ref in refs}
    held = {id(tensor_at(tape.root, path)) for path in used}
    shapes = {tensor_at(tape.root, path).shape for path in used}
    names = set() if len(used) == 1 and len(refs) > 1 else siblings(used, named)
    missing = [n for n in names if id(named[n]) not in held and named[n].shape in shapes and n not in flow.consumed]
    for path in used:
        starts = sorted({ref.origin for ref in refs if ref.path == path})
        apart = [a for a in range(len(starts[0])) if len({s[a] for s in starts}) > 1]
        if len(apart) == 1:
            places = sorted({s[apart[0]] for s in starts})
            step = min(b - a for a, b in zip(places, places[1:], strict=False))
            missing += [path] * (tensor_at(tape.root, path).shape[apart[0]] // step - len(places))
    return len(missing)

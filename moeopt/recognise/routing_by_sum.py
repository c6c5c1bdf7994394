"""Routing that no tensor holds, read off the sum: the block's own dispatch and sum, run on codes for the experts.

    for g in range(G):                                  a router for the groups, then one for the experts of each group,
        t = (group == g).nonzero()                      which sees the rows of that group alone
        q, e = topk(router_g(x[t]))
        for m in range(M):
            r, k = where(e == m)
            y.index_add_(0, t[r], expert_gm(x[t][r]) * q[r, k] * p[t[r]])

The sum is linear in the experts' outputs, with one weight for each token and expert. So where the rows of expert c are
replaced by the c-th unit vector, row t of the sum is the vector of weights w[t, c]: the code around the experts stays
as it is, and only their products become one op. That costs the calls of the block's own loop, so PyTorch gains nothing;
an engine gains a graph, since nothing of the loop depends on Python any more.

Legend: T tokens, C candidates (experts), H output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moeopt.capture.op_kinds import moves_rows
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.recognise.combine import Combine, Labels, needed
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.routing_types import Extraction, Routing, RoutingForm, Search, Table
from moeopt.recognise.token_rows import Tokens

NO_ONE_TENSOR = (
    "its routing stands in no one tensor (a router for each group of experts on the rows of that group, or a mask for "
    "each expert)"
)
ONE_TENSOR = (
    "make one tensor (tokens, experts) of all weights before the loop: each router on all tokens, the weights of "
    "levels multiplied, zeros where a mask is not set"
)

Code = tuple[fx.Node, fx.Node, int]


@dataclass
class SumOfCodes(Extraction):
    """(T, C) weights: what ``sums`` give at ``target`` where each node of ``codes`` is a unit vector in every row.

    ``codes``: of each call of an expert its output, its input rows and the number of its unit vector.
    ``table``: what comes out on the probe call. ``rows``: (C,) how many rows each expert had there.
    """

    target: fx.Node | None = None
    sums: tuple[fx.Node, ...] = ()
    codes: tuple[Code, ...] = ()
    table: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """What the dispatch and the sum read: rows, places, weights."""
        outs = {out for out, _, _ in self.codes}
        read = [a for n in self.sums for a in n.all_input_nodes if a not in outs and a not in self.sums]
        return list(dict.fromkeys([*read, *(rows for _, rows, _ in self.codes)]))

    @property
    def places(self) -> list[fx.Node | None]:
        """None of them is found again by itself: the sum of another call is read anew."""
        return []

    @property
    def experts(self) -> int:
        """C."""
        assert self.table is not None
        return int(self.table.shape[1])

    @property
    def missing(self) -> int:  # type: ignore[override]
        """Experts that the call did not reach, so that their part of the dispatch is not on the tape; or reached with
        one row, which Python may store in another way (``y[mask] = rows``)."""
        assert self.rows is not None
        return int((self.rows < 2).sum())

    def run(self, tape: Tape, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The weights on the probe call."""
        assert self.table is not None
        return self.table


def by_sum(labels: Labels, combine: Combine, tokens: Tokens, group: list[FFNCandidate], asked: bool) -> Search | None:
    """The search that takes the sum itself, where each expert's rows are rows of the tokens, moved and nothing else;
    None where it is not ``asked`` for."""

    def search(tape: Tape, before: list[fx.Node], table: Table, dtype: torch.dtype | None) -> Iterator[Routing]:
        count, shape = len(table.natural), combine.node.meta["shape"]
        for_all = table.chosen.all(0)
        shared = bool(for_all.any()) and not bool(for_all.all())  # it is no part of the choice
        carried = combine.base is None and combine.axis == len(shape) - 1 and count <= shape[-1]
        if shared or not carried or not table.weighed or labels.hidden or tokens.weighted or tokens.beside:
            return
        codes = [code for candidate in group for code in _codes(labels, tokens, candidate, table)]
        numbers = {number for _, _, number in codes}
        if len(numbers) < len(codes) or -1 in numbers:
            return
        sums = needed(descendants(tape, [out for out, _, _ in codes], combine.node.meta["index"]), combine.node)
        form = RoutingForm.DENSE if bool(for_all.all()) else RoutingForm.TABLE
        natural = torch.tensor(table.natural)
        weights, rows = table.weights[:, natural], table.visits.sum(0)[natural]
        made = SumOfCodes(None, [], (), combine.node, tuple(sums), tuple(codes), weights, rows)
        yield Routing(count, None, made, table.natural, form)

    return search if asked else None


def _codes(labels: Labels, tokens: Tokens, candidate: FFNCandidate, table: Table) -> Iterator[Code]:
    """An expert's outputs, its input rows and its number, -1 where a call serves several or its rows are changed."""
    rows = candidate.ins[0].operand
    fits = all(s.operand is rows for s in candidate.ins) and _moved_alone(rows, tokens.node)
    given = rows.meta["shape"]
    for out in candidate.outs:
        numbers = labels.candidate[out].unique().tolist()
        shape = out.node.meta["shape"]
        last = out.axis_out % len(shape) == candidate.ins[0].axis_in % len(shape) == len(shape) - 1
        plain = last and shape[:-1] == given[:-1] and out.order is None and out.blocks == 1
        if numbers:
            known = fits and plain and len(numbers) == 1 and numbers[0] >= 0
            yield out.node, rows, table.natural.index(numbers[0]) if known else -1


def _moved_alone(rows: fx.Node, tokens: fx.Node) -> bool:
    """Whether ``rows`` are those of ``tokens``, moved and nothing else: what else was done to them would be lost."""
    while rows is not tokens:
        read = [a for a in rows.all_input_nodes if a is tokens or tokens in ancestors([a])]
        source = rows.args[0] if rows.args else None
        if not moves_rows(rows) or not isinstance(source, fx.Node) or source not in read:
            return False
        rows = source
    return True


def unit_rows(rows: torch.Tensor, width: int, number: int) -> torch.Tensor:
    """(..., width) the unit vector ``number`` for each of (..., K) ``rows``."""
    unit = (torch.arange(width, device=rows.device) == number).to(rows.dtype)
    return unit.expand(*rows.shape[:-1], width)

"""Experts that read several rows of a token: a condition beside it, or products of it that all experts share.

    f_e(x[t], c[t])  ==  g_e([x, c][t])        g takes its row apart

The op hands an expert one row of one tensor, so the tensors are joined before it. Which token a row of the further
tensors is of, is not asked anew (the rows of a condition may be equal): they must be rows of the same tokens as the
first, in some tensor before the experts.

Legend: T tokens, R rows of one expert.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.row_flow import Branch
from moeopt.recognise.rows_carried import check_rows_carried
from moeopt.recognise.token_rows import Tokens, computed_before_choice, rows_as_bytes


def with_distinct_rows_first(tape: Tape, branches: list[Branch]) -> list[Branch]:
    """The same branches, of each the tensor with the most different rows as its ``start``."""
    count = len(branches[0].beside)
    if not count or any(len(b.beside) != count for b in branches):
        return branches
    starts = [(b.start, *b.beside) for b in branches]
    different = [sum(len(set(rows_as_bytes(_rows(tape, s[i])))) for s in starts) for i in range(count + 1)]
    first = max(range(count + 1), key=lambda i: different[i])
    return [_begun_at(b, s[first], s[:first] + s[first + 1 :]) for b, s in zip(branches, starts, strict=True)]


def _begun_at(branch: Branch, start: fx.Node, beside: tuple[fx.Node, ...]) -> Branch:
    readers = sorted((n for n in branch.inside if start in n.all_input_nodes), key=lambda n: n.meta["index"])
    return dataclasses.replace(branch, start=start, beside=beside, readers=readers)


def tokens_beside(tape: Tape, branches: list[Branch], group: list[FFNCandidate], tokens: Tokens) -> Tokens:
    """``tokens`` with the tensors that the branches read beside.

    Raises:
        Declined: no tensor before the experts holds those rows, at the same tokens.
    """
    found = []
    for place in range(len(branches[0].beside)):
        pairs = [(tokens.token[c.ins[0]], _rows(tape, b.beside[place])) for b, c in zip(branches, group, strict=True)]
        before = ancestors([b.beside[place] for b in branches])
        holds = (n for n in reversed(tape.nodes) if n in before and _holds(tape, n, tokens.count, pairs))
        node = next(holds, None)
        if node is None or tokens.weighted:
            starts = [read for b in branches for read in (b.start, *b.beside)]
            beside = branches[0].beside[place]
            raise computed_before_choice(tape, starts, beside) or Declined(
                "its experts read rows of several tensors, which are not rows of the same tokens; pick the rows of all "
                "of them by the same indices",
                beside.meta.get("source"),
            )
        found.append(node)
    return dataclasses.replace(tokens, beside=tuple(found))


def check_beside(tape: Tape, branches: list[Branch], found: Recognition) -> None:
    """Raise ``Declined`` where the code between the tensors beside and the experts does more than to pick rows."""
    for place, node in enumerate(found.tokens.beside):
        entries = [b.beside[place] for b in branches]
        if node in found.interior:
            raise Declined("one of its experts reads what another one made", node.meta.get("source"))
        end = max(entries, key=lambda n: n.meta["index"])
        check_rows_carried(tape, node, entries, [], end, [found.tokens.node, *found.routing.nodes], found.source)


def _holds(tape: Tape, node: fx.Node, tokens: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether ``node`` has T rows, and the rows read for each token are the token's."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if not shape or node.op == "get_attr" or len(shape) < 2 or dtype != pairs[0][1].dtype:
        return False
    if math.prod(shape[:-1]) != tokens or shape[-1] != pairs[0][1].shape[-1]:
        return False
    rows = _rows(tape, node)
    return all(bool((t >= 0).all()) and torch.equal(rows[t], read) for t, read in pairs)


def _rows(tape: Tape, node: fx.Node) -> torch.Tensor:
    rows: torch.Tensor = tape.value(node).reshape(-1, node.meta["shape"][-1])
    return rows

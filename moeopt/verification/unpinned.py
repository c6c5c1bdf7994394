"""A whole block, router included, as a runtime computes it: nothing pinned, on rows that no example has.

The cases of ``cases`` fix what the experts are given, and with it the routing that PyTorch computed. Here the runtime
routes. Its expert ids are compared with those of the rewritten block in PyTorch, token by token: what rounding
decides is a tie, and counted (``ties``); anything else is a failure. Then the numbers, of tokens that went to the
same experts. Each token of each kind of rows has a budget of its own:

    d_new[t] <= FACTOR * max(d_orig[t], typical, s) + EPS_ALLOWANCE * eps

d is the relative L2 distance from the original's code in float64; ``typical`` and s are of the rows of the same kind:
s is the most that the original's own result moves by when its inputs move by ``SHAKE`` eps. Rows on which the
original has no digits itself (the budget would be half of the norm) are not judged.

A block in which tokens depend on each other (a capacity) may send others elsewhere once a tie is broken otherwise: a
case that fails with ties is run once more with ordinary rows in the place of the tied ones.

Shape legend: R rows, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.value_types import PyObject
from moeopt.verification.distance import as_rows, finiteness, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR, typical
from moeopt.verification.model import CEILING
from moeopt.verification.oracle import record_selections, run_oracle, run_pinned
from moeopt.verification.results import CaseResult, Fail
from moeopt.verification.row_calls import RowCalls, Unpinned
from moeopt.verification.selections import OracleError, Selections
from moeopt.verification.steering import SteeredRows, steered_rows
from moeopt.verification.ties import RoutedCall, choices_of, differing, equal_scores, tied_tokens
from moeopt.verification.trees import flatten

DRAWS = 3
OFTEN = 0.4
"""Of ordinary rows: where more of them are ties that the runtime breaks otherwise, its results are another model's.

A router that gives every expert the same score (a gate of zeros, before training) prefers none of them: its ties are
counted and told, and refuse nothing.
"""


def check_unpinned(block: Unpinned, seed: int = 0) -> list[CaseResult]:
    """One result for each call of ``steering``, up to the first that failed; none where no argument holds rows."""
    leaf = next((n for n in block.call_spec.indices("tokens") if block.call_spec.rows(n).dim() == 2), None)
    if leaf is None or not len(block.call_spec.rows(leaf)):
        return []
    calls = RowCalls(block, leaf, seed)
    results: list[CaseResult] = []
    for rows in steered_rows(calls.ordinary, calls.probe, block.experts, calls.generator):
        result = CaseResult(rows.name)
        results.append(result)
        try:
            for part in calls.parts(rows):
                _run_case(block, calls, part, result)
        except Fail as failure:
            result.status, result.reason = "failed", str(failure)
            break
    return results


def _run_case(block: Unpinned, calls: RowCalls, rows: SteeredRows, result: CaseResult, again: bool = False) -> None:
    args, kwargs = calls.call(rows.values)
    try:
        y_orig, chosen = record_selections(block.original, args, kwargs)
    except Exception as err:
        result.status, result.reason = "skipped", f"the original raises {type(err).__name__}: {err}"
        return
    choices = choices_of(block.rewritten, args, kwargs)[1]
    try:
        y_new, ids = block.run(*args, **kwargs)
    except Exception as err:
        raise Fail(f"the runtime raises {type(err).__name__}: {str(err)[:200]}, the original does not") from err
    leaves = [flatten(y)[0] for y in (y_orig, y_new)]
    if len(leaves[0]) != len(leaves[1]):
        raise Fail(f"the runtime returns {len(leaves[1])} values, the original {len(leaves[0])}")
    eps = max((torch.finfo(t.dtype).eps for t in leaves[0] if _floating(t)), default=torch.finfo(rows.values.dtype).eps)
    _finite(rows, *leaves)
    noisy = [choices_of(block.rewritten, *calls.shaken(rows.values, draw, zeros=True))[1] for draw in range(DRAWS)]
    tied, elsewhere, named = torch.zeros(3, len(rows.values), dtype=torch.bool)
    try:
        for choice in choices:
            if choice.name in ids and ids[choice.name].shape == choice.ids.shape:
                others = [n for draw in noisy for n in draw if n.name == choice.name]
                here, moved = _routing(choice, ids[choice.name], eps, others, rows, result)
                if len(here) == len(tied):
                    tied, elsewhere = tied | here, elsewhere | moved
                    named |= (ids[choice.name].cpu().sort(-1).values != choice.ids.cpu().sort(-1).values).any(-1)
        own = _ordinary_rows(rows)
        often = int((elsewhere & _informed(choices, len(tied)))[own].sum())
        if often > OFTEN * len(own) and len(own) > 4 and not again:
            raise Fail(
                f"its router gives equal scores to several experts on {often} of {len(own)} ordinary rows (two rows of "
                "its weight may be equal), and the runtime takes others of them than PyTorch does: its results would "
                "be another model's. Make the scores differ, with a bias for instance"
            )
        left_out = elsewhere | _faint(choices, len(tied))
        _numbers(block, calls, rows, (args, kwargs, chosen), leaves, left_out, named | left_out, result)
    except Fail:
        sound = [i for i in _ordinary_rows(rows) if not tied[i]]
        if again or not elsewhere.any() or not sound:
            raise
        values, kinds = rows.values.clone(), list(rows.kinds)
        for i in tied.nonzero().flatten().tolist():
            values[i], kinds[i] = rows.values[sound[i % len(sound)]], "an ordinary row"
        _run_case(block, calls, SteeredRows(rows.name, values, kinds), result, again=True)


def _informed(choices: Sequence[RoutedCall], rows: int) -> Tensor:
    """(R,) bool: rows to which no choice gives equal scores. A choice for each pixel of an image tells of no row."""
    equal = [found for found in map(equal_scores, choices) if len(found) == rows]
    return ~functools.reduce(torch.logical_or, equal, torch.zeros(rows, dtype=torch.bool))


def _ordinary_rows(rows: SteeredRows) -> list[int]:
    return [i for i, kind in enumerate(rows.kinds) if kind == "an ordinary row"]


def _routing(
    choice: RoutedCall, ids: Tensor, eps: float, noisy: list[RoutedCall], rows: SteeredRows, result: CaseResult
) -> tuple[Tensor, Tensor]:
    """(T,) bool, twice: which tokens are tied, and which of them the runtime sends elsewhere. ``Fail`` for a flip."""
    ids = ids.cpu()
    moved = differing(choice, ids).cpu()
    tied = tied_tokens(choice, eps, noisy)[0]
    result.ids_compared += ids.numel()
    result.ties += int((moved & tied).sum())
    wrong = (moved & ~tied).nonzero().flatten().tolist()
    result.flips += len(wrong)
    if wrong:
        t = wrong[0]
        kind = rows.kinds[t] if len(tied) == len(rows.kinds) else "a row"
        raise Fail(
            f"its router sends {kind} (token {t}) to experts {ids[t].tolist()} instead of {choice.ids[t].tolist()}, "
            f"and rounding does not explain it ({len(wrong)} of {len(tied)} tokens go elsewhere)"
        )
    return tied, moved & tied


def _finite(rows: SteeredRows, ours: list[Any], theirs: list[Any]) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not _floating(a) or not a.numel():
            continue
        if a.shape != b.shape:
            raise Fail(f"output {number} is {tuple(b.shape)} instead of {tuple(a.shape)}")
        leaked = finiteness(a, b).leaked
        if leaked:
            kind = rows.kinds[leaked[0]] if len(as_rows(a)) == len(rows.kinds) else "these rows"
            raise Fail(
                f"output {number} is not finite for {kind} (token {leaked[0]}), where the original is "
                f"({len(leaked)} such tokens)"
            )


def _numbers(
    block: Unpinned, calls: RowCalls, rows: SteeredRows, pinned: tuple[Any, Any, Selections], leaves: list[list[Any]],
    elsewhere: Tensor, named: Tensor, result: CaseResult,
) -> None:  # fmt: skip
    """Judge the floating outputs, one kind of rows after the other.

    Args:
        elsewhere: (R,) bool, rows that are left out. named: these, and rows for which an expert of weight zero is
            another one: what counts names (a loss for balance, a mask over experts) shows it.
    """
    args, kwargs, chosen = pinned
    try:
        exact = flatten(run_oracle(block.original, args, kwargs, chosen))[0]
        shaken = [
            flatten(run_pinned(block.original, *calls.shaken(rows.values, draw), chosen))[0] for draw in range(DRAWS)
        ]
    except OracleError as err:
        result.notes.append(f"not compared with the original in float64: {err.reason}")
        return
    for number, (a, b, o) in enumerate(zip(*leaves, exact, strict=True)):
        if not _floating(a) or not a.numel() or o.shape != a.shape:
            continue
        y, new, true, *noisy = (as_rows(t) for t in (a, b, o, *(s[number] for s in shaken)))
        kinds, left_out = rows.kinds, named if y.shape[-1] == block.experts else elsewhere
        if len(y) != len(kinds):
            if named.any():
                continue  # an output that all tokens enter, also those that other experts served
            kinds, left_out = ["these rows"] * len(y), torch.zeros(len(y), dtype=torch.bool)
        judged = finiteness(a, b).both.cpu() & ~left_out & true.isfinite().all(-1).cpu()
        eps = torch.finfo(a.dtype).eps
        for kind in dict.fromkeys(kinds):
            at = judged & torch.tensor([k == kind for k in kinds])
            if at.any():
                at = at.to(y.device)
                mine, theirs = (token_distance(t[at], true[at], eps=eps) for t in (y, new))
                moved = [token_distance(n[at], y[at], eps=eps).nan_to_num(0.0) for n in noisy]
                _bound(f"output {number} of {kind}", mine, theirs, moved, eps, result)


def _bound(where: str, mine: Tensor, theirs: Tensor, moved: list[Tensor], eps: float, result: CaseResult) -> None:
    most = max((float(m.max()) for m in moved), default=0.0)
    floor = mine.clamp_min(max(typical(mine), most))
    sound = FACTOR * floor <= CEILING
    if not sound.any():
        return
    mine, theirs, floor = mine[sound], theirs[sound], floor[sound]
    excess = (theirs - EPS_ALLOWANCE * eps).clamp_min(0.0)
    factor = torch.where(excess > 0, excess / floor, 0.0)
    result.tokens += len(mine)
    result.distance_original = max(result.distance_original, float(mine.max()))
    result.distance_rewritten = max(result.distance_rewritten, float(theirs.max()))
    result.required = max(result.required, float(factor.max()))
    if (factor > FACTOR).any():
        t = int(factor.argmax())
        raise Fail(
            f"{where} lies {float(theirs[t]):.3g} from the original's code in float64, the original itself "
            f"{float(mine[t]):.3g}, and rounding explains {FACTOR * float(floor[t]) + EPS_ALLOWANCE * eps:.3g}"
        )


def _faint(choices: Sequence[RoutedCall], tokens: int) -> Tensor:
    """(T,) bool: tokens whose largest score is below the smallest normal number, and so has lost its digits."""
    found = torch.zeros(tokens, dtype=torch.bool)
    for scores in (e.scores for choice in choices for e in choice.events if e.scores is not None):
        largest = scores.reshape(-1, scores.shape[-1]).abs().amax(-1).cpu()
        if len(largest) == tokens:
            found |= (largest > 0) & (largest < torch.finfo(scores.dtype).tiny)
    return found


def _floating(value: PyObject) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

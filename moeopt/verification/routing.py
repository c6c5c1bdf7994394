"""Routing first: do original and rewritten send each token to the same experts?

Expert ids are compared as sets per token (T tokens, K chosen). Where they differ, the scores of the
experts exchanged decide: within ``TIE`` eps of the row's largest score, the two computations could
not tell them apart and it is a *tie*; above, it is a *flip*, and the rewrite is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeopt.verification.selections import Event, Selections

TIE = 8.0
"""Scores closer than TIE * eps * (largest score of the row) are within rounding: a score comes of a
dot product and a softmax, a few roundings each in the original and in the rewritten."""


@dataclass
class RoutingCheck:
    """Counts over one case; ``as_rewritten`` is the original's selections with ties broken as the rewritten did."""

    ids_compared: int = 0
    ties: int = 0
    flips: int = 0
    reason: str = ""
    as_rewritten: Selections | None = None


def compare_routing(
    original: Selections,
    rewritten: Selections,
    eps: float,
    ids_of: Callable[[Selections], list[Event]] | None = None,
) -> RoutingCheck:
    """Compare the routing events of two recorded runs.

    Args:
        eps: of the coarsest dtype in which scores may have been computed.
        ids_of: which events of a run are its routing; by default every top-k, sort, argmax, ... event.
    """
    pick = ids_of or Selections.routing
    check = RoutingCheck()
    theirs = list(pick(rewritten))
    pinned = original
    for event in pick(original):
        twin = _take_twin(event, theirs)
        if twin is None:
            continue
        new_ids = _compare(event, twin, eps, check)
        if new_ids is not None:
            pinned = pinned.replaced(event, event.with_ids(new_ids.reshape(event.ids.shape)))
    if check.ties and not check.flips:
        check.as_rewritten = pinned
    return check


def ids_seen(chosen: Selections, ids_of: Callable[[Selections], list[Event]] | None = None) -> list[int]:
    """The different ids of the last routing event among those that compare the most scores."""
    events = [e for e in (ids_of or Selections.routing)(chosen) if e.scores is not None and e.scores.dim()]
    if not events:
        return []
    most = max(e.scores.shape[-1] for e in events)  # type: ignore[union-attr]
    last = [e for e in events if e.scores.shape[-1] == most][-1]  # type: ignore[union-attr]
    return [int(n) for n in last.ids.unique()]


def _take_twin(event: Event, candidates: list[Event]) -> Event | None:
    """The first candidate with the same op and (T, K), else with the same (T, K); it is removed."""
    wanted = _flat(event.ids).shape
    same_shape = [c for c in candidates if _flat(c.ids).shape == wanted]
    same_op = [c for c in same_shape if c.op is event.op]
    twin = next(iter(same_op or same_shape), None)
    if twin is not None:
        candidates[:] = [c for c in candidates if c is not twin]
    return twin


def _compare(event: Event, twin: Event, eps: float, check: RoutingCheck) -> Tensor | None:
    """Count into ``check``; the ids with tied rows taken from ``twin``, or None when nothing was tied."""
    mine_TK, theirs_TK = _flat(event.ids), _flat(twin.ids)
    check.ids_compared += mine_TK.numel()
    if event.scores is None or mine_TK.shape[-1] == event.scores.shape[-1]:
        one_TK, two_TK = mine_TK, theirs_TK  # a whole order, not a set
    else:
        one_TK, two_TK = mine_TK.sort(-1).values, theirs_TK.sort(-1).values
    differ_T = (one_TK != two_TK).any(-1)
    if not differ_T.any():
        return None
    scores_TE = None if event.scores is None else event.scores.reshape(-1, event.scores.shape[-1]).double()
    if scores_TE is not None:
        differ_T &= ~scores_TE.isnan().any(-1)
        eps = max(eps, torch.finfo(event.scores.dtype).eps)  # type: ignore[union-attr]
    for t in differ_T.nonzero().flatten().tolist():
        margin = allowed = 0.0
        if scores_TE is not None:
            mine, theirs = (scores_TE[t][ids[t]] for ids in (mine_TK, theirs_TK))
            if one_TK is not mine_TK:
                mine, theirs = mine.sort().values, theirs.sort().values
            margin = float(torch.where(mine == theirs, 0.0, (mine - theirs).abs()).max())
            row = scores_TE[t]
            allowed = TIE * eps * float(row[row.isfinite()].abs().max() if row.isfinite().any() else 0.0)
        if scores_TE is not None and margin <= allowed:
            check.ties += 1
            continue
        check.flips += 1
        check.reason = check.reason or (
            f"token {t} goes to experts {theirs_TK[t].tolist()} instead of {mine_TK[t].tolist()}; their scores differ "
            f"by {margin:.3g}, and rounding explains {allowed:.3g}"
        )
    return torch.where(differ_T[:, None], theirs_TK, mine_TK)


def _flat(ids: Tensor) -> Tensor:
    return ids.reshape(ids.shape[:-1].numel(), ids.shape[-1])

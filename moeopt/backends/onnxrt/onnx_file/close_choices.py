"""Choices between scores that are too close: ONNX Runtime may make them otherwise, and is right too.

    scores (0.31, 0.2502, 0.25, ...), two are chosen       its sums run in another order, and it takes the third

A run is pinned to its own choices; the same run with neighbours exchanged that rounding does not tell apart gives the
other result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moeopt.verification.oracle import run_oracle
from moeopt.verification.routing import TIE
from moeopt.verification.selections import Event, OracleError, Selections


def nearer_of(theirs: Tensor, oracle: Tensor, other: Tensor, axis: int) -> Tensor:
    """Of two results the one that is nearer to ``theirs``, token by token.

    Args:
        axis: where a token's features are; where there is no such axis, the last.
    """
    axis = axis if axis < theirs.dim() else -1
    far, far_other = ((theirs.double() - one.double()).square().sum(axis, keepdim=True) for one in (oracle, other))
    return torch.where(far_other < far, other, oracle)


def with_other_choices(module: nn.Module, values: Sequence[Tensor], choices: Selections) -> Iterator[Sequence[Tensor]]:
    """A module's float64 results with the choices that rounding decides made otherwise; two at most, each with every
    second pair of neighbours exchanged."""
    for odd in (0, 1):
        other = choices
        for event in choices.routing():
            other = other.replaced(event, _otherwise(event, odd) or event)
        if any(one is not before for one, before in zip(other.events, choices.events, strict=True)):
            try:
                found = run_oracle(module, tuple(values), {}, other)
            except OracleError:
                continue
            yield found if isinstance(found, tuple) else (found,)


def _otherwise(event: Event, odd: int) -> Event | None:
    """The event with neighbours exchanged whose scores rounding does not tell apart; None where no row has such.

    Of a whole order, those at every second place and the ones behind them; of a choice of some, the last of these and
    the nearest of the others.
    """
    if event.scores is None or event.ids.shape[:-1] != event.scores.shape[:-1]:
        return None
    scores, order, taken = event.scores.double(), event.ids, event.ids.shape[-1]
    if taken < scores.shape[-1]:
        from_last = (scores - scores.gather(-1, order[..., -1:])).abs()
        order = torch.cat([order, from_last.scatter(-1, order, torch.inf).argmin(-1, keepdim=True)], -1)
    ranked = scores.gather(-1, order)
    allowed = TIE * torch.finfo(event.scores.dtype).eps * scores.abs().amax(-1, keepdim=True)
    close = (ranked[..., :-1] - ranked[..., 1:]).abs() <= allowed
    places = torch.arange(close.shape[-1])
    close &= places % 2 == odd if taken == scores.shape[-1] else places == taken - 1
    if not close.any():
        return None
    moved = torch.arange(order.shape[-1]).expand(order.shape).clone()
    moved[..., :-1] += close.long()
    moved[..., 1:] -= close.long()
    return event.with_ids(order.gather(-1, moved)[..., :taken])

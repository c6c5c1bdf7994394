"""Choices between scores that are too close: ONNX Runtime may make them otherwise, and is right too.

    scores (0.31, 0.2502, 0.25, ...), two are chosen       its sums run in another order, and it takes the third

A run is pinned to its own choices; the same run with neighbours exchanged that rounding does not tell apart gives the
other result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
    """A module's float64 results with the choices that rounding decides made otherwise: with every second pair of
    neighbours exchanged, and with the first one or two of all that are alike behind the others, so that each of three
    that are alike is left out once."""
    for exchange in (_pairs(0), _pairs(1), _turned(1), _turned(2)):
        other = choices
        for event in choices.routing():
            other = other.replaced(event, _otherwise(event, exchange) or event)
        if any(one is not before for one, before in zip(other.events, choices.events, strict=True)):
            try:
                found = run_oracle(module, tuple(values), {}, other)
            except OracleError:
                continue
            yield found if isinstance(found, tuple) else (found,)


Exchange = Callable[[Tensor, int], Tensor]
"""Of ``close`` (..., N - 1), whether rounding tells each of N scores from the next, and the number of those that are
taken: the places (..., N) that scores come from."""


def _pairs(odd: int) -> Exchange:
    """Of a whole order those at every second place and the ones behind them are exchanged; of a choice of some, the
    last of these and the nearest of the others."""

    def exchange(close: Tensor, taken: int) -> Tensor:
        places = torch.arange(close.shape[-1])
        moving = close & (places % 2 == odd if taken > close.shape[-1] else places == taken - 1)
        moved = torch.arange(close.shape[-1] + 1).expand(*close.shape[:-1], -1).clone()
        moved[..., :-1] += moving.long()
        moved[..., 1:] -= moving.long()
        return moved

    return exchange


def _turned(by: int) -> Exchange:
    """The first ``by`` of all neighbours that are alike come last."""

    def exchange(close: Tensor, taken: int) -> Tensor:
        starts = torch.cat([torch.ones_like(close[..., :1]), ~close], -1)
        places = torch.arange(starts.shape[-1]).expand(starts.shape)
        first = torch.where(starts, places, 0).cummax(-1).values
        group = starts.long().cumsum(-1) - 1
        size = torch.zeros_like(group).scatter_add(-1, group, torch.ones_like(group)).gather(-1, group)
        return first + (places - first + by) % size

    return exchange


def _otherwise(event: Event, exchange: Exchange) -> Event | None:
    """The event with scores exchanged that rounding does not tell apart; None where no row has such."""
    if event.scores is None or event.ids.shape[:-1] != event.scores.shape[:-1]:
        return None
    scores, order, taken = event.scores.double(), event.ids, event.ids.shape[-1]
    if taken < scores.shape[-1]:
        from_last = (scores - scores.gather(-1, order[..., -1:])).abs().scatter(-1, order, torch.inf)
        others = from_last.topk(min(2, scores.shape[-1] - taken), -1, largest=False).indices
        order = torch.cat([order, others], -1)
    ranked = scores.gather(-1, order)
    allowed = TIE * torch.finfo(event.scores.dtype).eps * scores.abs().amax(-1, keepdim=True)
    close = (ranked[..., :-1] - ranked[..., 1:]).abs() <= allowed
    if not close.any():
        return None
    return event.with_ids(order.gather(-1, exchange(close, taken))[..., :taken])
